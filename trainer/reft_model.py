"""A frozen base model with trainable interventions, and a forward that skips dead work.

Three things make a step cheap, none of which changes a gradient:

- Columns before the first edited one are the base's own: they run without a graph, once
  if there is memory to keep their keys and values, and the rest runs on those.
- Below the first edited layer nothing needs a gradient, so autograd records nothing there.
- Logits are computed only for cells that carry loss.

Dimension letters as in :mod:`trainer.collate`; S = T − split, M edits, N completion tokens
in the batch, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from reft_core.adapter import EditKey, Prefix
from reft_core.edits import Edit
from reft_core.loading import cache_argument
from reft_core.methods import Intervention
from reft_core.methods.placement import Placement
from reft_core.methods.virtual import VirtualTokens
from reft_core.sites import SiteEdit, edit_site, find_layers
from trainer.collate import IGNORED
from trainer.prefix import PrefixStore

Cells = tuple[Tensor, Tensor]
"""Row and column (M,) of each state one unit edits, in a (B, S, d) tensor."""


class LossAndLogits(TypedDict):
    """What a forward returns."""

    loss: Tensor
    """() float32: mean over the completion tokens of the batch."""
    logits: Tensor
    """(N, V) of the cells whose label is not :data:`IGNORED`, row by row."""


class ReftModel(nn.Module):
    """Interventions where ``placement`` puts them; the base itself never changes.

    The base's parameters are frozen in place and it stays in eval mode. It is hooked only
    while :meth:`forward` runs.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        placement: Placement | None,
        *,
        num_units: int,
        prefixes: PrefixStore | None = None,
        virtual: VirtualTokens | None = None,
    ) -> None:
        """Trains a placement's interventions, ``virtual`` tokens, or both."""
        super().__init__()
        self.placement = placement
        self.virtual = virtual
        self._edits = True
        self._prefixes = prefixes or PrefixStore(base, max_bytes=0)
        self.base = base.requires_grad_(False).eval()
        # Not registered here: these modules belong to the base already.
        self._layers = find_layers(base)
        self._head: Callable[[], nn.Module] = base.get_output_embeddings
        built = {} if placement is None else placement.build(num_units)
        self.keys = tuple(built)
        self.interventions = nn.ModuleList(built.values())

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and batches are to be."""
        return self.trainable()[0].device

    @override
    def train(self, mode: bool = True) -> Self:
        """Set the interventions' mode; the frozen base keeps its dropout off."""
        super().train(mode)
        self.base.eval()
        return self

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the optimiser may change."""
        return [p for part in self._trained() for p in part.parameters() if p.requires_grad]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`trainable` as torch's optimisers take them."""
        return [{"params": self.trainable(), "lr": learning_rate}]

    def trained_state(self) -> list[dict[str, Tensor]]:
        """A copy of what training changes."""
        return [
            {name: tensor.clone() for name, tensor in part.state_dict().items()}
            for part in self._trained()
        ]

    def load_trained_state(self, state: Sequence[dict[str, Tensor]]) -> None:
        """Put back what :meth:`trained_state` returned."""
        for part, tensors in zip(self._trained(), state, strict=True):
            part.load_state_dict(tensors)

    def to_prefix(self) -> Prefix | None:
        """The virtual tokens with the present parameters, if there are any."""
        return None if self.virtual is None else self.virtual.to_prefix()

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """While open, :meth:`forward` is the base model's own."""
        self._edits = False
        try:
            yield
        finally:
            self._edits = True

    def to_edits(self) -> dict[EditKey, Edit]:
        """The canonical edits with the present parameters, on the CPU."""
        return {
            key: intervention.to_edit().to(device="cpu") for key, intervention in self._by_key()
        }

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        edit_columns: Tensor,
        edit_valid: Tensor,
        split: int,
    ) -> LossAndLogits:
        """Loss and logits of a :class:`trainer.collate.Batch`."""
        if self._edits and self.virtual is not None:
            return self._with_virtual(
                input_ids, attention_mask, position_ids, labels, edit_columns, edit_valid
            )
        cache = None
        if split > 0:
            cache = self._prefixes.cache(
                input_ids[:, :split], attention_mask[:, :split], position_ids[:, :split]
            )
        cells = self._edited_cells(attention_mask, labels, edit_columns, edit_valid)
        return self._loss_and_logits(
            labels,
            [(rows, columns - split) for rows, columns in cells],
            input_ids=input_ids[:, split:],
            attention_mask=attention_mask,
            position_ids=position_ids[:, split:],
            use_cache=cache is not None,
            **cache_argument(self.base, cache),
        )

    def _with_virtual(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        edit_columns: Tensor,
        edit_valid: Tensor,
    ) -> LossAndLogits:
        """The forward behind n virtual tokens, which stand in columns 0 to n − 1.

        Every position attends to them, so no column can be computed without a graph.
        """
        assert self.virtual is not None
        size, n = len(input_ids), self.virtual.length
        cells = self._edited_cells(attention_mask, labels, edit_columns, edit_valid)
        mask = F.pad(attention_mask, (n, 0), value=1)
        positions = position_ids + n
        if self.virtual.kind == "kv":
            cache = DynamicCache()
            states = self.virtual.keys_and_values().to(self.base.dtype)
            for layer, (keys, values) in enumerate(states):  # (KH, n, D)
                cache.update(keys.expand(size, -1, -1, -1), values.expand(size, -1, -1, -1), layer)
            return self._loss_and_logits(
                labels,
                cells,
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **cache_argument(self.base, cache),
            )
        embedded = self.base.get_input_embeddings()(input_ids)  # (B, T, d)
        virtual = self.virtual.embedding.to(embedded.dtype).expand(size, -1, -1)
        first = torch.arange(n, device=positions.device).expand(size, -1)
        return self._loss_and_logits(
            labels,
            [(rows, columns + n) for rows, columns in cells],
            inputs_embeds=torch.cat([virtual, embedded], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([first, positions], dim=1),
            use_cache=False,
        )

    def _loss_and_logits(
        self, labels: Tensor, cells: Sequence[Cells], **inputs: Any
    ) -> LossAndLogits:
        """The base on ``inputs`` with ``cells`` edited, columns counted from the inputs' own."""
        carries_loss = labels != IGNORED  # (B, C)
        with self._hooked(cells, carries_loss):
            logits = self.base(**inputs, logits_to_keep=labels.shape[1]).logits[0]  # (N, V)
        loss = F.cross_entropy(logits.float(), labels[carries_loss])
        return LossAndLogits(loss=loss, logits=logits)

    def _edited_cells(
        self, attention_mask: Tensor, labels: Tensor, edit_columns: Tensor, edit_valid: Tensor
    ) -> list[Cells]:
        """The cells of each unit, in columns of the batch; none where the base alone runs."""
        cells = _cells(edit_columns, edit_valid & self._edits)
        if self._edits and self.placement is not None and self.placement.phase == "all":
            # Completion tokens that are read, not only predicted, belong to the last unit.
            start = attention_mask.shape[1] - labels.shape[1] + 1
            rows, columns = attention_mask[:, start:].nonzero(as_tuple=True)
            edited_rows, edited_columns = cells[-1]
            cells[-1] = (
                torch.cat([edited_rows, rows]),
                torch.cat([edited_columns, columns + start]),
            )
        return cells

    def _trained(self) -> list[nn.Module]:
        """The modules that training changes."""
        return [self.interventions] if self.virtual is None else [self.interventions, self.virtual]

    @contextmanager
    def _hooked(self, cells: Sequence[Cells], carries_loss: Tensor) -> Iterator[None]:
        """While open, the base applies the interventions and spares needless logits.

        ``cells`` of each unit, columns counted from the split; ``carries_loss`` (B, C).
        """

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Besides sparing padding, this makes one matrix of the slice (B, C, d) that the
            # head is given; for a strided batch torch would copy the head's weights B times.
            return (args[0][carries_loss].unsqueeze(0), *args[1:])  # (1, N, d)

        with ExitStack() as stack:
            stack.callback(self._head().register_forward_pre_hook(select).remove)
            for key, intervention in self._by_key():
                if len(cells[key.unit][0]):
                    edit = _cell_editor(intervention, cells[key.unit])
                    stack.callback(edit_site(self._layers[key.layer], key.site, edit).remove)
            yield

    def _by_key(self) -> Iterator[tuple[EditKey, Intervention]]:
        for key, intervention in zip(self.keys, self.interventions, strict=True):
            assert isinstance(intervention, Intervention)
            yield key, intervention


def _cells(edit_columns: Tensor, edit_valid: Tensor) -> list[Cells]:
    """The valid cells of each unit, of ``edit_columns`` and ``edit_valid`` (B, U, K)."""
    found = []
    for unit in range(edit_valid.shape[1]):
        rows, places = edit_valid[:, unit].nonzero(as_tuple=True)  # (M,), (M,)
        found.append((rows, edit_columns[rows, unit, places]))
    return found


def _cell_editor(intervention: Intervention, cells: Cells) -> SiteEdit:
    """A function from a site's output (B, S, d) and input to the output with cells edited.

    The sum is taken in float32 and rounded once to the base's dtype, as serving does.
    """

    def edit(hidden: Tensor, x: Tensor) -> Tensor:
        h = hidden[cells].float()  # (M, d)
        read = x[cells].float() if intervention.source == "input" else h
        return hidden.index_put(cells, (h + intervention(h, read)).to(hidden.dtype))

    return edit
