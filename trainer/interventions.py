"""Trainable interventions, hooked into the layers of a frozen model while it runs.

Dimension letters: B rows, T columns, M edited cells, d width of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from reft_core.adapter import EditKey
from reft_core.edits import Edit
from reft_core.methods import Intervention
from reft_core.methods.placement import Placement
from reft_core.methods.rotated import rotating_together
from reft_core.sites import SiteEdit, edit_site

Cells = tuple[Tensor, Tensor]
"""Row and column (M,) of each state one unit edits, in a (B, T, d) tensor."""


class Interventions(nn.Module):
    """The interventions that ``placement`` builds for ``layers``; none without a placement."""

    def __init__(
        self, layers: Sequence[nn.Module], placement: Placement | None, num_units: int
    ) -> None:
        super().__init__()
        # Not registered here: the layers belong to their model.
        self._layers = tuple(layers)
        built = {} if placement is None else placement.build(num_units)
        self.keys = tuple(built)
        self.modules_by_key = nn.ModuleList(built.values())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules_by_key)

    def by_key(self) -> Iterator[tuple[EditKey, Intervention]]:
        """Each intervention with its place."""
        for key, intervention in zip(self.keys, self.modules_by_key, strict=True):
            assert isinstance(intervention, Intervention)
            yield key, intervention

    def to_edits(self) -> dict[EditKey, Edit]:
        """The canonical edits with the present parameters, on the CPU."""
        return {key: intervention.to_edit().to(device="cpu") for key, intervention in self.by_key()}

    @contextmanager
    def hooked(self, cells: Sequence[Cells | None]) -> Iterator[list[nn.Parameter]]:
        """While open, the layers apply each unit's interventions to its cells; None: to all.

        Gives the parameters that take no part, since their units have no cells.
        """
        unused: list[nn.Parameter] = []
        with ExitStack() as stack:
            stack.enter_context(rotating_together(self))
            for key, intervention in self.by_key():
                edited = cells[key.unit]
                if edited is None:
                    edit = _editor(intervention)
                elif len(edited[0]):
                    edit = _cell_editor(intervention, edited)
                else:
                    unused += intervention.parameters()
                    continue
                stack.callback(edit_site(self._layers[key.layer], key.site, edit).remove)
            yield unused


def with_unused(loss: Tensor, unused: Sequence[nn.Parameter]) -> Tensor:
    """``loss`` with zero gradients of what took no part in it.

    Processes that train together expect a gradient of every parameter.
    """
    for parameter in unused:
        loss = loss + 0 * parameter.sum()
    return loss


def _cell_editor(intervention: Intervention, cells: Cells) -> SiteEdit:
    """A function from a site's output (B, T, d) and input to the output with cells edited.

    The sum is taken in float32 and rounded once to the base's dtype, as serving does.
    """

    def edit(hidden: Tensor, x: Tensor) -> Tensor:
        h = hidden[cells].float()  # (M, d)
        read = x[cells].float() if intervention.source == "input" else h
        return hidden.index_put(cells, (h + intervention(h, read)).to(hidden.dtype))

    return edit


def _editor(intervention: Intervention) -> SiteEdit:
    """:func:`_cell_editor` for every cell, which needs no gathering."""

    def edit(hidden: Tensor, x: Tensor) -> Tensor:
        h = hidden.float().flatten(0, -2)  # (B·T, d)
        read = x.float().flatten(0, -2) if intervention.source == "input" else h
        edited: Tensor = h + intervention(h, read)
        return edited.to(hidden.dtype).view_as(hidden)

    return edit
