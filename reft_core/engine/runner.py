"""Runs the base model on a step's batch. Knows tensors and slots; no queues, no requests' ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_core.adapter import EditKey
from reft_core.agreement import TOLERANCE, disagreement
from reft_core.batch import (
    AdapterUse,
    EditPlan,
    Narrowing,
    PackedChunk,
    build_decode_plan,
    build_plan,
)
from reft_core.engine.attention import (
    ATTENTION_NAME,
    Copied,
    DecodeBatch,
    ForwardBatch,
    PrefillBatch,
    Segment,
)
from reft_core.engine.config import Forward
from reft_core.engine.cuda_graphs import DecodeGraphs, Record
from reft_core.engine.fused import Branch, FusedForward
from reft_core.engine.kv import SlotKV
from reft_core.engine.sequence import Sequence as EngineSequence
from reft_core.engine.sharing import Chunk, Layout, Level, Own, common, lay_out
from reft_core.errors import UnsupportedModel
from reft_core.kernels import edited, grouped_kernel
from reft_core.loading import LoadedModel
from reft_core.sites import SiteEdit, edit_site, find_layers

NO_EDITS = EditPlan()

_CHECK_TOKENS = 12
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrefillLogits:
    """What a prefill's chunks put out, float32, in the order of the chunks."""

    next: Tensor
    """(K, V) of the last token of each chunk after which a token is wanted."""
    scored: Tensor
    """(S, V) of the positions that each chunk scores."""


class ModelRunner:
    """Forwards of one base model over one KV store.

    Takes the model over: its attention implementation is switched for good. Where there is a
    fused forward, it runs whatever it can; edits elsewhere enter transformers' forward as hooks
    that exist only while it runs. A decode forward has no edits, unless a sequence in it uses
    an adapter that declares to edit generated tokens too.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: SlotKV,
        forward: Forward = "auto",
        *,
        record: Record | None = None,
    ) -> None:
        self._model = loaded.model
        self._layers = find_layers(loaded.model)
        self._kv = kv
        self._device = kv.device
        self._vocab_size = loaded.description.vocab_size
        self.num_edits_applied = 0
        self._fused: FusedForward | None = None
        self._check_against_model()
        if forward != "transformers" and FusedForward.is_for(loaded.model):
            self._try_fused(native=forward == "auto")
        grouped_kernel(self._device)  # compiled now, not in the first request that needs it
        self.graphs: DecodeGraphs | None = None
        if record is not None:
            tolerance = TOLERANCE[kv.all.dtype]
            self.graphs = DecodeGraphs(self._decode_plain, kv, record, tolerance=tolerance)
            self.graphs.warm_up()

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> PrefillLogits:
        """Compute chunks of many prompts in one packed forward, with their edits.

        Fills their slots; the caller advances ``num_computed``.
        """
        for chunk in chunks:
            if chunk.start <= chunk.sequence.num_virtual:
                self._read_sources(chunk.sequence)
                self._fill_prefix(chunk.sequence)
        layout = lay_out(chunks)
        tokens: list[int] = []
        positions: list[int] = []
        virtual: list[tuple[int, Tensor]] = []
        for chunk, own in zip(chunks, layout.first.own, strict=True):
            tokens += chunk.sequence.token_ids[own.first : own.end]
            positions += range(own.first, own.end)
            virtual += _virtual_rows(chunk.sequence, own)
        last_rows = [
            layout.row_of(layout.last, chunk, chunk.end - 1)
            for chunk in chunks
            if chunk.wants_token
        ]
        scored_rows = [
            layout.row_of(layout.last, chunk, position)
            for chunk in chunks
            for position in chunk.scored
        ]
        read = last_rows + scored_rows
        narrowing = self._narrowing(layout, read)
        rows = None
        if narrowing is not None:
            rows = self._indices(list(narrowing.places))
            read = [narrowing.places[row] for row in read]
        plan = build_plan(
            [
                PackedChunk(own.row, own.first, own.end - own.first, chunk.sequence.edits)
                for chunk, own in zip(chunks, layout.last.own, strict=True)
            ],
            self._device,
            narrowing,
        )
        with self._embedded(virtual):
            logits = self._forward(
                torch.tensor([tokens], device=self._device),
                torch.tensor([positions], device=self._device),
                self._batch(layout, layout.first),
                self._indices(read),
                plan,
                layout,
                rows,
            )
        self.num_edits_applied += plan.num_edits
        return PrefillLogits(logits[0, : len(last_rows)], logits[0, len(last_rows) :])

    def can_branch(self, sequence: EngineSequence) -> bool:
        """Whether the forward that takes a sequence's edits can share lower layers only."""
        if self._fused is None:
            return False
        active = sequence.edits.active() if sequence.edits else ()
        return all(
            FusedForward.passes_by(key.site, edit)
            for _, use in active
            for key, edit in use.edits.items()
        )

    def _narrowing(self, layout: Layout, read: list[int]) -> Narrowing | None:
        """The last layer goes on with the rows whose logits are read, once it has stored its keys
        and values. None where the forward to come cannot do that."""
        num_layers = len(self._layers)
        if layout.last.stage == num_layers or not all(
            self.can_branch(chunk.sequence) for chunk in layout.chunks
        ):
            return None
        return Narrowing(num_layers - 1, {row: i for i, row in enumerate(sorted(set(read)))})

    def _batch(self, layout: Layout, level: Level) -> PrefillBatch:
        """What the rows of a level attend over."""
        segments: list[Segment] = []
        copied: list[Copied] = []
        before: EngineSequence | None = None
        for chunk, own in zip(layout.chunks, level.own, strict=True):
            slot, end_row = chunk.sequence.slot, own.row + own.end - own.first
            if own.first < own.end:
                num_shared = 0
                if before is not None and own.first > 0:
                    same = common(before, chunk.sequence).same
                    num_shared = min(same, own.first, segments[-1].first_position)
                segments.append(Segment(own.row, end_row, slot, own.first, num_shared))
                before = chunk.sequence
            if chunk.lead is not None and chunk.start < own.first:
                source = chunk.lead.chunk.sequence.slot
                copied.append(Copied(source, slot, chunk.start, own.first))
        return PrefillBatch(self._kv, segments, copied)

    def _branches(self, layout: Layout, plan: EditPlan) -> tuple[EditPlan, list[Branch]]:
        """The edits of a layout's first level, and the levels after it."""
        ends = [*(level.stage for level in layout.levels[1:]), None]
        plans = [
            plan.between(
                level.stage,
                end,
                None if level is layout.last else self._indices(layout.rows_at(level)),
            )
            for level, end in zip(layout.levels, ends, strict=True)
        ]
        branches = [
            Branch(level.stage, self._indices(level.taken), self._batch(layout, level), own)
            for level, own in zip(layout.levels[1:], plans[1:], strict=True)
        ]
        return plans[0], branches

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def decode(
        self, running: Sequence[EngineSequence], only: EngineSequence | None = None
    ) -> Tensor:
        """One token for each slot 0..B-1; ``running[i]`` owns slot i. Float32 logits (B, V).

        Rows of sequences that are still being prefilled are idle, and of all but one if ``only``
        is given: they compute something meaningless, and the key they store at their next
        position is overwritten when that position is prefilled or decoded.
        """
        ready = [s.is_prefilled and only in (None, s) for s in running]
        tokens = [s.token_ids[-1] if ok else 0 for s, ok in zip(running, ready, strict=True)]
        positions = [sequence.num_computed for sequence in running]
        plan = NO_EDITS
        if any(sequence.edits and sequence.edits.edits_decode for sequence in running):
            edits = [s.edits if ok else None for s, ok in zip(running, ready, strict=True)]
            plan = build_decode_plan(edits, self._device)
        if self.graphs is not None and not plan.places:
            replayed = self.graphs.decode(tokens, positions)
            if replayed is not None:
                return replayed
        position_ids = torch.tensor(positions, device=self._device)
        logits = self._forward(
            torch.tensor(tokens, device=self._device).unsqueeze(1),
            position_ids.unsqueeze(1),
            DecodeBatch(self._kv, position_ids, max(positions) + 1),
            0,
            plan,
        )
        self.num_edits_applied += plan.num_edits
        return logits[:, -1]

    def _decode_plain(self, tokens: Tensor, positions: Tensor, batch: DecodeBatch) -> Tensor:
        """Float32 logits (B, V) of a decode step without edits."""
        return self._forward(tokens, positions, batch, 0)[:, -1]

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        batch: ForwardBatch,
        keep: Tensor | int,
        plan: EditPlan = NO_EDITS,
        layout: Layout | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Float32 logits of the edited model over ``tokens`` (B, T); ``keep`` selects columns.

        A prefill says by its layout where rows branch; ``plan`` and ``keep`` count the rows of
        its last level. For ``rows`` see :class:`FusedForward`.
        """
        branches: list[Branch] = []
        if self._fused is not None and self._fused.can_edit(plan):
            if layout is not None and len(layout.levels) > 1:
                plan, branches = self._branches(layout, plan)
            return self._fused(tokens, positions, batch, keep, plan, branches, rows).float()
        assert rows is None, "this forward goes on with all rows"
        assert layout is None or len(layout.levels) == 1, "this forward does not branch"
        with edited(self._layers, plan):
            return self._by_transformers(tokens, positions, batch, keep)

    def _by_transformers(
        self, tokens: Tensor, positions: Tensor, batch: ForwardBatch, keep: Tensor | int
    ) -> Tensor:
        """The same through the model's own code, with whatever hooks it has."""
        output: Any = self._model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            reft_batch=batch,
        )
        logits: Tensor = output.logits
        return logits.float()

    def _read_sources(self, sequence: EngineSequence) -> None:
        """Run the source prompts of a sequence's interchanges, and keep what they need of it.

        The forwards use the sequence's own slot, which is empty before its first chunk.
        """
        for use in sequence.edits.uses if sequence.edits else ():
            if not use.interchanges or use.source_parts:
                continue
            with ExitStack() as hooks:
                for key in use.interchanges:
                    hook = edit_site(self._layers[key.layer], key.site, _keep_source(use, key))
                    hooks.callback(hook.remove)
                length = len(use.source)
                self._by_transformers(
                    torch.tensor([use.source], device=self._device),
                    torch.arange(length, device=self._device).unsqueeze(0),
                    PrefillBatch(self._kv, [Segment(0, length, sequence.slot, 0)]),
                    1,
                )
            self._kv.clear(sequence.slot, length)

    def _fill_prefix(self, sequence: EngineSequence) -> None:
        """Put the keys and values of a sequence's trained prefix, if any, into its slot."""
        adapter = sequence.edits.prefixed if sequence.edits else None
        if adapter is None or adapter.prefix is None:
            return
        pairs = zip(adapter.prefix.keys, adapter.prefix.values, strict=True)
        for layer, (key, value) in enumerate(pairs):
            self._kv.append(layer, sequence.slot, 0, key, value)

    @contextmanager
    def _embedded(self, virtual: list[tuple[int, Tensor]]) -> Iterator[None]:
        """The model with these rows' input embeddings (d,) replaced, for one forward."""
        if not virtual:
            yield
            return
        rows = torch.tensor([row for row, _ in virtual], device=self._device)
        vectors = torch.stack([vector for _, vector in virtual])

        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            output[0].index_copy_(0, rows, vectors.to(output.dtype))
            return output

        handle = self._model.get_input_embeddings().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _try_fused(self, *, native: bool) -> None:
        """Take the fused forward if it computes what the model does."""
        started = time.monotonic()
        try:
            self._fused = FusedForward(self._model, native=native)
            self._check_against_model()
        except Exception as error:
            self._fused = None
            log.warning("the faster forward is not used: %s", error)
            return
        size, seconds = self._fused.num_bytes / 2**20, time.monotonic() - started
        log.info("packed %.0f MiB of weights for a faster forward, in %.1f s", size, seconds)

    @torch.inference_mode()
    def _check_against_model(self) -> None:
        """Prefill in two chunks and decode a few tokens; compare with the model itself.

        An architecture may hold something that packed slots do not reproduce (attention
        sinks, learnt position biases, state besides keys and values). Better to refuse it
        at start than to answer wrongly.
        """
        model = self._model
        generator = torch.Generator().manual_seed(0)
        count = min(_CHECK_TOKENS, self._kv.slot_len)
        tokens = torch.randint(self._vocab_size, (1, count), generator=generator).to(self._device)
        # Eager is each model's own definition; faster ones may leave out a soft cap.
        model.set_attn_implementation("eager")
        expected = model(input_ids=tokens, use_cache=False).logits[0].float()
        model.set_attn_implementation(ATTENTION_NAME)

        positions = torch.arange(count, device=self._device).unsqueeze(0)
        split, decode_from = count // 3, 2 * count // 3
        found = []
        for start, end in ((0, split), (split, decode_from)):
            if start < end:
                batch = PrefillBatch(self._kv, [Segment(0, end - start, 0, start)])
                found.append(
                    self._forward(tokens[:, start:end], positions[:, start:end], batch, 0)[0]
                )
        for at in range(decode_from, count):
            decode = DecodeBatch(self._kv, positions[0, at : at + 1], at + 1)
            now = slice(at, at + 1)
            found.append(self._forward(tokens[:, now], positions[:, now], decode, 0)[0])
        self._kv.clear(0, count)

        dtype = self._kv.all.dtype
        error, tolerance = disagreement(torch.cat(found), expected, dtype), TOLERANCE[dtype]
        if not error <= tolerance:
            raise UnsupportedModel(
                f"{type(model).__name__}: the engine's logits differ from the model's own by "
                f"{error:.2g} of their largest value, expected at most {tolerance}; the "
                "architecture is not supported"
            )


def _keep_source(use: AdapterUse, key: EditKey) -> SiteEdit:
    """A hook on the site of an interchange that stores s·R and leaves the site as it is."""
    positions = list(use.adapter.rule.resolve(len(use.source))[key.unit])
    down = use.edits[key].down  # −R
    assert down is not None

    def keep(h: Tensor, _x: Tensor) -> Tensor:
        states = h.view(-1, h.shape[-1])[positions].float()  # (K, d)
        use.source_parts[key] = -(states @ down)
        return h

    return keep


def _virtual_rows(sequence: EngineSequence, own: Own) -> list[tuple[int, Tensor]]:
    """Rows that hold trained input embeddings, with those embeddings (d,)."""
    adapter = sequence.edits.prefixed if sequence.edits else None
    if adapter is None or adapter.prefix is None or adapter.prefix.embedding is None:
        return []
    embedding = adapter.prefix.embedding[own.first : own.end]
    return [(own.row + offset, vector) for offset, vector in enumerate(embedding)]
