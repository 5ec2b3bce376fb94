"""Any method or adapter on the four axes of He et al. 2022 (arXiv 2110.04366), table 1."""

from __future__ import annotations

from dataclasses import dataclass

from reft_core.edits import Part, Source
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS, Intervention
from reft_core.spec import AdapterSpec, PrefixSpec, SiteSpec

_REPRESENTATIONS = {
    "block_output": "the block's output (residual stream)",
    "attn_output": "the attention's output",
    "mlp_output": "the FFN's output",
    "heads": "the output of each attention head",
    "linear": "the output of linear maps",
}
_ATTENTION_PREFIX = "softmax(qPₖᵀ)Pᵥ, with l keys Pₖ and values Pᵥ a layer"
_GATED = "h ← (1 − λ(x))·h + λ(x)·Δ, λ being the attention paid to the prefix"
_PROMPT_SCOPE = "prompt tokens at the adapter's positions"
_ALL_SCOPE = "prompt tokens at the adapter's positions, and every generated token"


@dataclass(frozen=True)
class Axes:
    """One edit of one representation, in the paper's terms. Row vectors, as everywhere."""

    form: str
    """Functional form of Δ."""
    representation: str
    """What is modified."""
    insertion: str
    """sequential: Δ is a function of what it modifies; parallel: of the module's input."""
    composition: str
    """How h and Δ make the new h."""
    scope: str
    """Which tokens are touched, beyond the paper's table."""

    def lines(self) -> list[tuple[str, str]]:
        """Each axis with its name, for people."""
        return [
            ("functional form", self.form),
            ("modified representation", self.representation),
            ("insertion form", self.insertion),
            ("composition function", self.composition),
            ("tokens", self.scope),
        ]


def describe_method(name: str) -> list[Axes]:
    """The axes of a method at its own default site; one entry for each part of it.

    Knows every method of the registry, ``prefix_tuning``, ``prompt_tuning`` and ``mam``,
    which is prefix tuning at the attention with a scaled parallel adapter at the FFN (§4.6).
    Raises :class:`InvalidRequest` for other names.
    """
    composed = {
        "prefix_tuning": [_PREFIX["kv"]],
        "prompt_tuning": [_PREFIX["embedding"]],
        "mam": [_PREFIX["kv"], _of_method(METHODS["scaled_parallel_adapter"])],
    }
    if name in METHODS:
        return [_of_method(METHODS[name])]
    if name not in composed:
        allowed = "one of " + ", ".join(sorted([*METHODS, *composed]))
        raise InvalidRequest.because("method", name, allowed)
    return composed[name]


def describe_adapter(spec: AdapterSpec) -> list[tuple[str, Axes]]:
    """For each site of an adapter, and its prefix if it has one, where it sits and its axes."""
    found = [(name, _of_site(name, site)) for name, site in spec.sites.items()]
    if spec.prefix is not None:
        found.insert(0, (f"prefix of {spec.prefix.length}", _of_prefix(spec.prefix)))
    return found


def _of_method(method: type[Intervention]) -> Axes:
    site = method.sites[0]
    return Axes(
        form=method.equation,
        representation=_REPRESENTATIONS[site],
        insertion=_insertion(method.parts(method.activations[0]), method.source),
        composition="h ← h + Δ",
        scope=_PROMPT_SCOPE if method.phase == "prompt" else _ALL_SCOPE,
    )


def _of_site(name: str, site: SiteSpec) -> Axes:
    kind, _, path = name.partition(":")
    representation = f"the output of {path}" if path else _REPRESENTATIONS[kind]
    layers = ", ".join(map(str, site.layers))
    return Axes(
        form=formula(site),
        representation=f"{representation}, layers {layers}",
        insertion=_insertion(site.parts, site.source),
        composition="h ← h + strength·Δ",
        scope=_PROMPT_SCOPE if site.phase == "prompt" else _ALL_SCOPE,
    )


def formula(site: SiteSpec) -> str:
    """The canonical edit with the terms that a site has: down, skip (d, r), up (r, d), …"""
    x, parts = ("x" if site.source == "input" else "h"), set(site.parts)
    if site.interchange:
        return f"((s − h)R)Rᵀ with R = upᵀ [rank {site.rank}], s from the source prompt"
    terms = []
    if "down" in parts:
        inner = f"{x}·down" + " + bias" * ("bias" in parts)
        if site.activation != "identity":
            inner = f"{site.activation}({inner})"
        if "skip" in parts:
            inner += f" − {x}·skip"
        scale = f"{site.scale:g}·" if site.scale != 1 else ""
        terms.append(f"{scale}({inner})·up [rank {site.rank}]")
    terms += ["shift"] * ("shift" in parts) + ["gain∘h"] * ("gain" in parts)
    return " + ".join(terms)


def _of_prefix(prefix: PrefixSpec) -> Axes:
    return _PREFIX[prefix.kind]


def _insertion(parts: tuple[Part, ...], source: Source) -> str:
    if set(parts) == {"shift"}:
        return "none: Δ is a constant"
    return "sequential" if source == "output" else "parallel"


_PREFIX = {
    "kv": Axes(
        form=_ATTENTION_PREFIX,
        representation="the output of each attention head",
        insertion="parallel",
        composition=_GATED,
        scope="every token, prompt and generated, through attention",
    ),
    "embedding": Axes(
        form="softmax(qPₖᵀ)Pᵥ, with Pₖ and Pᵥ computed from l trained input embeddings",
        representation="the output of each attention head",
        insertion="parallel",
        composition=_GATED,
        scope="every token, prompt and generated, through attention",
    ),
}
