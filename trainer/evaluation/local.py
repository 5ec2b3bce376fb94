"""Contenders in this process: a base model and adapter files, and the engine that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reft_core.adapter import Adapter, check_fits, read_adapter
from reft_core.classification import EncoderEngine
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.errors import InvalidRequest, ReftError
from reft_core.loading import Dtype, LoadedModel, load_any, model_kind
from reft_core.spec import TemplateSpec
from trainer.data.templates import LABEL_TEMPLATE, PLAIN_TEMPLATE
from trainer.evaluation.asking.engine import Encoding, EngineAsker
from trainer.evaluation.asking.heads import HeadAsker
from trainer.evaluation.asking.interface import Asker, Contender, Question, Reply
from trainer.evaluation.asking.seq2seq import Seq2SeqAsker

BATCH = 32
"""Requests that run at once."""
BASE = "base"
"""Name of the contender without an adapter."""
Template = Literal["auto", "chat", "plain"]


class LocalAsker:
    """Implements :class:`asking.Asker` by an engine just large enough for what is asked.

    The engine takes the model over, and ends with the answers.
    """

    def __init__(self, loaded: LoadedModel, batch: int = BATCH) -> None:
        self._loaded = loaded
        self._batch = batch

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """See :meth:`asking.Asker.ask`."""
        if not questions:
            return
        tokenizer = self._loaded.tokenizer
        longest = Encoding(tokenizer).longest(questions)
        config = EngineConfig(max_model_len=longest, max_num_seqs=self._batch)
        engine = EmbeddedEngine(self._loaded, config)
        engine.start()
        try:
            yield from EngineAsker(engine, tokenizer, max_open=8 * self._batch).ask(questions)
        finally:
            engine.stop()


@dataclass(frozen=True)
class Local:
    """A model that has been loaded, and who is to answer on it."""

    asker: Asker
    contenders: tuple[Contender, ...]
    """The base first, if it can answer."""
    labels: tuple[str, ...]
    """Those of the first adapter that brings any, as it writes them."""
    is_encoder: bool


@contextmanager
def open_local(
    model: str,
    adapters: Sequence[Path],
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    template: Template | TemplateSpec = "auto",
    are_labels: bool = False,
    batch: int = BATCH,
    with_base: bool = True,
) -> Iterator[Local]:
    """``model`` and the adapters at these paths, ready to be asked.

    An adapter is asked by its own template and, so that the edits alone differ, the base by the
    first one's, unless ``template`` says another for all. A base without adapters is asked in the
    words of training: ``are_labels`` says that the rows have a text and a label. Raises what
    reading and loading do.
    """
    read = [adapter for path in adapters for adapter in read_adapters(path)]
    loaded = load_any(model, dtype=dtype, device=device)
    kind = model_kind(loaded.model.config)
    for adapter in read:
        check_fits(adapter.spec, loaded.description)
    labels = next((a.spec.task.labels for a in read if a.spec.task.labels), ())
    # An encoder says nothing without a head, and heads are the adapters'.
    alone = (None,) if with_base and kind != "encoder" else ()
    contenders = contenders_of(loaded, [*alone, *read], dtype, template, are_labels=are_labels)
    if not contenders:
        expected = "at least one, with a trained head" if kind == "encoder" else "at least one"
        raise InvalidRequest.because("adapter", [str(path) for path in adapters], expected)
    if kind != "encoder":
        asker = LocalAsker(loaded, batch) if kind == "causal" else Seq2SeqAsker(loaded, batch)
        yield Local(asker, contenders, labels or (), is_encoder=False)
        return
    engine = EncoderEngine(loaded)
    engine.start()
    try:
        yield Local(HeadAsker(engine, loaded.tokenizer), contenders, labels or (), is_encoder=True)
    finally:
        engine.stop()


def contenders_of(
    loaded: LoadedModel,
    adapters: Sequence[Adapter | None],
    dtype: str,
    template: Template | TemplateSpec = "auto",
    *,
    are_labels: bool = False,
) -> tuple[Contender, ...]:
    """A contender for each adapter, None being the base; names are made distinct."""
    without = PLAIN_TEMPLATE if not loaded.tokenizer.chat_template else None
    brought = [adapter.spec.template for adapter in adapters if adapter is not None]
    of_base = (brought or [LABEL_TEMPLATE if are_labels else without])[0]
    model = f"{loaded.description.name} {loaded.description.fingerprint} {dtype}"
    found: list[Contender] = []
    for adapter in adapters:
        name = BASE if adapter is None else adapter.spec.name
        if any(other.name == name for other in found):
            name = f"{name}-{len(found)}"
        own = of_base if adapter is None else adapter.spec.template
        given = {"auto": own, "chat": None, "plain": PLAIN_TEMPLATE}
        chosen = template if isinstance(template, TemplateSpec) else given[template]
        identity = model if adapter is None else f"{model} {adapter.digest}"
        found.append(Contender(name, identity, adapter, template=chosen))
    return tuple(found)


def read_adapters(path: Path) -> list[Adapter]:
    """The adapter in a file, or those in every ``.safetensors`` file of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not path.exists():
        expected = "an adapter's .safetensors file, or a folder with some"
        raise InvalidRequest.because("adapter", str(path), expected)
    found = []
    for file in files:
        try:
            found.append(read_adapter(file))
        except ReftError as error:
            raise error.within(str(file)) from None
    return found
