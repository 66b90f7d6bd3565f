"""Method: the base class of everything that makes a model cheaper. One method = its options plus a few pure steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sandcat.errors import BadRecipe, NothingMatched, suggest
from sandcat.models.view import ModelView, Site
from sandcat.support.options import coerce, field_type, option, type_text

Spec = dict[str, Any]
"""What was decided for one site, in JSON types."""

Tensors = dict[str, Tensor]
"""The buffers of one site that `Spec` is too small for, by their name in the built module."""


SLOTS = ("weight", "input", "attention", "cache", "experts", "residual")
"""What a method can claim of a site, in the order in which methods apply: how a weight is stored; which input channels
or neurons are skipped, which is decided on the weights as stored; how attention computes; what a cache keeps and how;
what is read of experts; what is added to the residual state."""

NEEDS = ("inputs", "outputs", "gradients", "queries", "keys")
"""What a method can ask calibration for; the fields of `Seen`."""


@dataclass(frozen=True)
class Seen:
    """What calibration saw at one site, batch by batch: what the method `needs`; the other fields are empty.

    Rows of inputs, outputs and gradients are tokens, without the first positions of each window.
    """

    inputs: list[Tensor] = field(default_factory=list)
    """[T, H] each."""
    outputs: list[Tensor] = field(default_factory=list)
    """[T, O] each."""
    gradients: list[Tensor] = field(default_factory=list)
    """Those of the log-likelihood of tokens that the model draws itself, at the outputs, [T, O] each."""
    queries: list[Tensor] = field(default_factory=list)
    """As attention multiplies them, of all positions, [windows, heads, L, D] each."""
    keys: list[Tensor] = field(default_factory=list)
    """[windows, key-value heads, L, D] each."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Options (the fields) and the steps choose -> decide -> build. Nothing here changes the model."""

    name: ClassVar[str]
    """The word on the command line, in the plan, and of the file."""
    slot: ClassVar[str]
    """What it claims of its linear layers, one of `SLOTS`; two methods on one slot of one layer conflict."""
    whole_model: ClassVar[bool] = False
    """Whether all sites are decided together, by `settle`, as heads must be that share one budget. What `decide` gives
    is then not in place while the layers after it are calibrated."""
    served: ClassVar[str | None] = None
    """What an engine with model code of its own (vLLM) has to do for it: "channels" have thresholds, or "neurons", or
    weights are "codes"; None: it runs in transformers only."""
    format: ClassVar[str] = "float"
    """How it stores weights, a name of `FORMATS`."""

    layers: str | tuple[int, ...] = option("all", 'decoder layers to change: "all", a slice "4:28", or a list [0,2,5]')

    @property
    def needs(self) -> frozenset[str]:
        """What `decide` looks at, of `NEEDS`; nothing, if it takes no calibration text."""
        return frozenset({"inputs"})

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration text."""
        return bool(self.needs)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(
                self, f.name, coerce(self.name, f.name, field_type(type(self), f.name), getattr(self, f.name))
            )
        self.chosen_layers(0)

    def chosen_layers(self, count: int) -> set[int]:
        """Indices of the layers to change, of `count` layers; negative indices count from the end."""
        if self.layers == "all":
            return set(range(count))
        if isinstance(self.layers, str):
            parts = self.layers.split(":")
            try:
                if not 2 <= len(parts) <= 3:
                    raise ValueError
                chosen = set(range(count)[slice(*(int(p) if p.strip() else None for p in parts))])
            except ValueError:
                raise BadRecipe(
                    f'{self.name}: layers={self.layers!r} is neither "all" nor a slice such as "4:28" nor a list such '
                    "as [0,2,5]."
                ) from None
            return chosen
        return {i + count if i < 0 else i for i in self.layers}

    def select(self, view: ModelView) -> list[Site]:
        """The sites that this method changes in this model.

        Raises:
            NothingMatched: the options select no layer, or a layer that the model does not have.
        """
        count = len(view.layers)
        chosen = self.chosen_layers(count)
        if not chosen or not chosen <= set(range(count)):
            raise NothingMatched(
                f"{self.name}: layers={self.layers!r} selects {sorted(chosen) or 'nothing'}, but the model has layers "
                f"0 to {count - 1}."
            )
        kinds = self.kinds(view)
        chosen |= {count}  # the head is in no layer: its kind alone decides
        return [site for site in view.sites() if site.layer in chosen and site.kind in kinds]

    def kinds(self, view: ModelView) -> Collection[str]:
        """The kinds of sites that this method changes; by default whole MLPs."""
        return ("mlp",)

    def claims(self, view: ModelView, site: Site) -> list[str]:
        """Names of the linear layers at `site` that this method skips parts of; no other may have its slot there."""
        return view.skipped_at(site)

    @abstractmethod
    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        """What to do at `site`, from what it sees in calibration."""

    def settle(self, view: ModelView, found: dict[str, tuple[Spec, Tensors]]) -> dict[str, tuple[Spec, Tensors]]:
        """What to do in the model as a whole, from what `decide` found at each site, by the sites' names; a site that
        is left out stays as it is. Called where `whole_model` is set."""
        return found

    @abstractmethod
    def build(self, site: Site, spec: Spec) -> nn.Module:
        """The module that replaces the site's, sharing its weights; works on the meta device. All that loading runs."""

    def limits(self, site: Site) -> dict[str, tuple[int, int]]:
        """Of each whole number in a spec that `build` makes tensors by: the least and the most it can be at `site`."""
        return {}

    def fill(self, module: nn.Module, tensors: Tensors) -> None:
        """Puts what `decide` found into what `build` laid out. Never runs when loading."""
        for name, tensor in tensors.items():
            target = getattr(module, name)
            target.data = tensor.to(target)

    @property
    def has_sparsity(self) -> bool:
        """Whether sites can be given sparsities of their own: the method has the option `sparsity`."""
        return "sparsity" in self.options()

    def bytes_read(self, site: Site) -> int:
        """Bytes of weights that a token reads at `site` at the method's sparsity, which takes no text to know."""
        return self.build(site, {}).weight_bytes(1 - self.options()["sparsity"])

    def at(self, sparsity: float) -> Method:
        """The same method with another sparsity."""
        changed: dict[str, Any] = {"sparsity": sparsity}
        return replace(self, **changed)

    def options(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={value}".replace(" ", "")
            for f, value in zip(fields(self), self.options().values(), strict=True)
            if getattr(self, f.name) != f.default
        ]
        return ":".join([self.name, ",".join(changed)]) if changed else self.name

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Method:
        """Makes the method from option names and values (or their texts).

        Raises:
            BadRecipe: an unknown option, or a value outside its range.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise BadRecipe(f"{cls.name} has no option {name!r}{suggest(name, known)} Known: {', '.join(known)}.")
        return cls(**options)

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Each option as {name, type, default, help}."""
        return [
            {
                "name": f.name,
                "type": type_text(field_type(cls, f.name)),
                "default": None if f.default is MISSING else f.default,
                "help": f.metadata["help"],
            }
            for f in fields(cls)
        ]


def pick_kinds(method: str, sites: str | tuple[str, ...], known: list[str], family: str) -> Collection[str]:
    """The kinds of sites that an option `sites` asks for: "all", or a list of them.

    Raises:
        NothingMatched: the family has no such site.
    """
    if sites == "all":
        return known
    for site in sites:
        if site not in known:
            raise NothingMatched(
                f"{method}: a {family} model has no site {site!r}{suggest(site, known)} It has {', '.join(known)}."
            )
    return sites


def check_sites(method: str, sites: str | tuple[str, ...], words: tuple[str, ...] = ("all",)) -> None:
    """
    Raises:
        BadRecipe: an option `sites` that is a word other than these.
    """
    if isinstance(sites, str) and sites not in words:
        raise BadRecipe(f"{method}: sites={sites!r} is neither {', '.join(words)} nor a list such as [q,k,v,o].")


Decided = dict[tuple[Method, str], Tensors]
"""The tensors of a plan, by method and site name."""
