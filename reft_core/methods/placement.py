"""A method put on sites of a model: its interventions, and how the adapter file names them."""

from __future__ import annotations

from dataclasses import dataclass

from reft_core.adapter import EditKey
from reft_core.edits import Activation
from reft_core.errors import InvalidRequest
from reft_core.methods import METHODS, Intervention, SiteSizes, get_method
from reft_core.methods.base import Phase
from reft_core.sites import ModelDescription
from reft_core.spec import MAX_RANK, SiteSpec


@dataclass(frozen=True)
class Placement:
    """One method on some sites of some layers. :meth:`on` makes it, checked against a model."""

    method: type[Intervention]
    model: ModelDescription
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    activation: Activation
    phase: Phase
    scale: float | None = None
    """s of Δ, for methods that have one; None is the method's own."""

    @classmethod
    def on(
        cls,
        model: ModelDescription,
        method: str,
        *,
        layers: tuple[int, ...],
        rank: int = 4,
        sites: tuple[str, ...] | None = None,
        activation: Activation | None = None,
        phase: Phase | None = None,
        scale: float | None = None,
    ) -> Placement:
        """The placement, with the method's own defaults for what is left out.

        Raises :class:`InvalidRequest` naming the option for an unknown method, a site the
        model does not have or the method cannot take, an activation the method does not
        take, a rank or layer out of range, or a scale where the method has none. Methods on
        linear maps have no default site: which maps is a choice. Methods without a rank
        ignore ``rank``.
        """
        kind = get_method(method)
        chosen = sites if sites is not None else kind.sites[:1]
        if chosen == ("linear",) or not chosen:
            known = ", ".join(name for name in model.sites if name.startswith("linear:"))
            raise InvalidRequest.because("sites", sites, f"some of {known}")
        for site in chosen:
            if site not in model.sites:
                raise InvalidRequest.because("sites", site, f"some of {', '.join(model.sites)}")
            if kind.sites == ("heads",) and site != "heads":
                raise InvalidRequest.because("sites", site, f"heads, the one site of {method}")
        act = activation if activation is not None else kind.activations[0]
        if act not in kind.activations:
            allowed = f"one of {', '.join(kind.activations)}"
            raise InvalidRequest.because("activation", act, allowed)
        in_range = all(0 <= layer < model.num_layers for layer in layers)
        if not layers or not in_range or list(layers) != sorted(set(layers)):
            raise InvalidRequest.because(
                "layers", list(layers), f"some of 0 to {model.num_layers - 1}, ascending, each once"
            )
        if scale is not None and not kind.has_scale:
            scaled = ", ".join(name for name, other in METHODS.items() if other.has_scale)
            raise InvalidRequest.because("scale", scale, f"none; methods with one are {scaled}")
        placement = cls(kind, model, chosen, layers, rank, act, phase or kind.phase, scale)
        most = min(placement._most_rank(site) for site in chosen)
        if kind.has_rank and not 1 <= rank <= most:
            raise InvalidRequest.because("rank", rank, f"1 to {most}")
        return placement

    def build(self, num_units: int) -> dict[EditKey, Intervention]:
        """Freshly initialised interventions, one a layer, site and unit."""
        return {
            EditKey(layer, site, unit): self._intervention(site)
            for site in self.sites
            for layer in self.layers
            for unit in range(num_units)
        }

    def site_specs(self) -> dict[str, SiteSpec]:
        """The spec's entry for each site."""
        hidden = self.model.hidden_size
        specs = {}
        for site in self.sites:
            sizes = self._sizes(site)
            specs[site] = SiteSpec(
                layers=self.layers,
                rank=self.method.stored_rank(self.rank, sizes),
                parts=self.method.parts(self.activation),
                activation=self.activation,
                source=self.method.source,
                phase=self.phase,
                interchange=self.method.interchanges,
                in_size=None if sizes.in_size == hidden else sizes.in_size,
                out_size=None if sizes.out_size == hidden else sizes.out_size,
            )
        return specs

    def _intervention(self, site: str) -> Intervention:
        """One freshly initialised intervention."""
        built = self.method(self._sizes(site), self.rank, self.activation)
        if self.scale is not None:
            built.scale = self.scale
        return built

    def _most_rank(self, site: str) -> int:
        """Largest rank at a site: what is stored must fit its widths and the file format."""
        sizes = self._sizes(site)
        stored_per_rank = max(1, self.method.stored_rank(1, sizes))
        return min(sizes.in_size, sizes.out_size, MAX_RANK) // stored_per_rank

    def _sizes(self, site: str) -> SiteSizes:
        in_size, out_size = self.model.sites[site]
        return SiteSizes(in_size, out_size, self.model.head_dim if site == "heads" else 0)
