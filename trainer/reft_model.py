"""A frozen base model with trainable interventions, and a forward that skips dead work.

What makes a step cheap, none of which changes a gradient:

- Tokens before a row's first edited one are the base's own: they run without a graph, once
  if there is memory to keep their keys and values, and the rest runs on those.
- The rest runs without padding, and what rows have in common runs once (:mod:`trainer.packing`).
- Below the first edited layer nothing needs a gradient: it runs once if there is memory to keep
  what comes out of it, and never with a graph.
- Logits are computed only for cells that carry loss, and no edit in the last layer elsewhere.
- All bases of an adapter are made orthonormal in one batched product.

Dimension letters as in :mod:`trainer.collate` and :mod:`trainer.packing`; M cells of one unit,
d hidden size, V vocabulary; here N counts completion tokens, or cells where that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from reft_core.adapter import EditKey, Prefix
from reft_core.edits import Edit
from reft_core.methods import Intervention
from reft_core.methods.placement import Placement
from reft_core.methods.rotated import rotating_together
from reft_core.methods.virtual import VirtualTokens
from reft_core.sites import SiteEdit, edit_site, find_layers
from trainer.collate import IGNORED
from trainer.frozen import FrozenBase
from trainer.interventions import with_unused
from trainer.packing import Packing, unpad
from trainer.prefix import PrefixStore
from trainer.row_attention import RowAttention, attending_by_row, check_packs

_ONE_TOKEN_SITES = ("block_output", "attn_output", "mlp_output", "heads")
"""Sites whose output at a token reaches other tokens through later layers only."""

_LEAST_READ = 16
"""Cells whose logits are computed at least. The gradient of a logit is a sum over the vocabulary;
for 3 rows MKL adds its 49,152 terms one after the other, with an error of 1e-4, for 12 of 1e-6."""


class LossAndLogits(TypedDict):
    """What a forward returns."""

    loss: Tensor
    """() float32: mean over the completion tokens of the batch."""
    logits: Tensor
    """(N, V) of the cells whose label is not :data:`IGNORED`, row by row."""


class ReftModel(FrozenBase):
    """Interventions where ``placement`` puts them; the base itself never changes.

    It is hooked only while :meth:`forward` runs.
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
        """Trains a placement's interventions, ``virtual`` tokens, or both.

        Raises :class:`UnsupportedModel` for a base whose rows cannot be packed.
        """
        super().__init__(base)
        self.placement = placement
        self.virtual = virtual
        self._edits = True
        self._prefixes = prefixes or PrefixStore(base, max_bytes=0)
        check_packs(base)
        # Not registered here: these modules belong to the base already.
        self._layers = find_layers(base)
        built = {} if placement is None else placement.build(num_units)
        self.keys = tuple(built)
        first = min((key.layer for key in self.keys), default=0) if virtual is None else 0
        self._below = self._prefixes.states(first)
        self.interventions = nn.ModuleList(built.values())

    @property
    @override
    def trained_parts(self) -> list[nn.Module]:
        return [self.interventions] if self.virtual is None else [self.interventions, self.virtual]

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
    ) -> LossAndLogits:
        """Loss and logits of a :class:`trainer.collate.Batch`."""
        virtual = self.virtual if self._edits else None
        rows = unpad(
            input_ids,
            attention_mask,
            self._units(attention_mask, labels, edit_columns, edit_valid),
            last_prompt=input_ids.shape[1] - labels.shape[1],
            whole=virtual is not None,
        )
        if virtual is not None and virtual.kind == "embedding":
            rows = [row.behind(virtual.length) for row in rows]
        packing = Packing.of(rows, edit_valid.shape[1], input_ids.device)
        answers = labels != IGNORED  # (B, C)
        predicting = packing.predicting(labels.shape[1])[answers]  # (N,)
        read, which = torch.unique(predicting, return_inverse=True)
        inputs = self._inputs(packing, virtual)  # before there are hooks: it may run the base
        with ExitStack() as stack:
            if self._below is not None:
                states = self._below.read(packing, inputs["reft_batch"])
                stack.enter_context(self._below.giving(states))
            stack.enter_context(attending_by_row(self.base))
            unused = stack.enter_context(self._hooked(packing.edited, read))
            kept = F.pad(read, (0, max(0, _LEAST_READ - len(read))))
            logits = self.base(**inputs, logits_to_keep=kept).logits[0]
        logits = logits[which]  # (N, V)
        loss = F.cross_entropy(logits.float(), labels[answers])
        return LossAndLogits(loss=with_unused(loss, unused), logits=logits)

    def _units(
        self, attention_mask: Tensor, labels: Tensor, edit_columns: Tensor, edit_valid: Tensor
    ) -> list[dict[int, tuple[int, ...]]]:
        """For each row the units that edit a column, by column."""
        units: list[dict[int, tuple[int, ...]]] = [{} for _ in labels]
        places = edit_valid.nonzero()
        columns = edit_columns[edit_valid]
        for (row, unit, _), column in zip(places.tolist(), columns.tolist(), strict=True):
            units[row][column] = (*units[row].get(column, ()), unit)
        if self.placement is not None and self.placement.phase == "all":
            # Completion tokens that are read, not only predicted, belong to the last unit.
            start = attention_mask.shape[1] - labels.shape[1] + 1
            for row, column in attention_mask[:, start:].nonzero().tolist():
                units[row][column + start] = (edit_valid.shape[1] - 1,)
        return units

    def _inputs(self, packing: Packing, virtual: VirtualTokens | None) -> dict[str, Any]:
        """What the base is given: the cells, and what stands before them."""
        if virtual is None:
            lengths = [len(row.beginning) for row in packing.rows]
            if not any(lengths):
                return RowAttention(packing).inputs()
            before = self._prefixes.read([row.beginning for row in packing.rows])
            num_before = torch.tensor(lengths, device=packing.tokens.device)
            return RowAttention(packing, before, num_before).inputs()
        if virtual.kind == "kv":
            states = virtual.keys_and_values().to(self.base.dtype)  # (L, 2, KH, n, D)
            before = states.unsqueeze(2).expand(-1, -1, len(packing.rows), -1, -1, -1)
            found = RowAttention(packing, before).inputs()
            return found | {"position_ids": found["position_ids"] + virtual.length}
        # Every row begins with them, so they are the first cells.
        own = self.base.get_input_embeddings()(packing.tokens[virtual.length :])  # (N − n, d)
        embedded = torch.cat([virtual.embedding.to(own.dtype), own])
        return RowAttention(packing).inputs() | {"input_ids": None, "inputs_embeds": embedded[None]}

    @contextmanager
    def _hooked(self, edited: Sequence[Tensor], read: Tensor) -> Iterator[list[nn.Parameter]]:
        """While open, the base applies the interventions to the cells ``edited`` of each unit.

        ``read`` are the cells whose logits are wanted. Gives the parameters that take no part.
        """
        unused: list[nn.Parameter] = []
        last = len(self._layers) - 1
        with ExitStack() as stack:
            stack.enter_context(rotating_together(self.interventions))
            for key, intervention in self._by_key():
                cells = edited[key.unit]
                if key.layer == last and key.site in _ONE_TOKEN_SITES:
                    cells = cells[torch.isin(cells, read)]
                if len(cells) and self._edits:
                    edit = _cell_editor(intervention, cells)
                    stack.callback(edit_site(self._layers[key.layer], key.site, edit).remove)
                else:
                    unused += intervention.parameters()
            yield unused

    def _by_key(self) -> Iterator[tuple[EditKey, Intervention]]:
        for key, intervention in zip(self.keys, self.interventions, strict=True):
            assert isinstance(intervention, Intervention)
            yield key, intervention


def _cell_editor(intervention: Intervention, cells: Tensor) -> SiteEdit:
    """A function from a site's output (1, N, d) and input to the output with ``cells`` edited.

    The sum is taken in float32 and rounded once to the base's dtype, as serving does. ``cells``
    (M,) are numbers of cells.
    """

    def edit(hidden: Tensor, x: Tensor) -> Tensor:
        h = hidden[0].index_select(0, cells).float()  # (M, d)
        reads_input = intervention.source == "input"
        read = x[0].index_select(0, cells).float() if reads_input else h
        edited = (h + intervention(h, read)).to(hidden.dtype)
        return hidden.index_copy(1, cells, edited.unsqueeze(0))

    return edit
