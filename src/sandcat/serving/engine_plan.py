"""What a plan says of the fused layers of an engine, and of the share of them that one process has.

Nothing here knows an engine: layers are names, as the engine has them, and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sandcat.errors import PlanError, UnsupportedModel
from sandcat.models.families import ACTIVATIONS, ARCHITECTURES, Architecture
from sandcat.plans.plan import Plan, layer_of

SHARDS = {"q": 0, "k": 1, "v": 2}
"""How engines number the parts of a fused projection of attention; others have numbers for names."""


@dataclass(frozen=True)
class Part:
    """A linear layer of the checkpoint that is a part of an engine's layer: whether its input channels have thresholds,
    and how its weights are stored, a name of `FORMATS`."""

    channels: bool = False
    format: str = "float"


@dataclass(frozen=True)
class Sites:
    """What is done where, by the names that modules have in the engine: `kinds` of `Method.served`, and the formats of
    those whose weights are codes."""

    kinds: dict[str, frozenset[str]]
    architecture: Architecture
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def head_skips(self) -> bool:
        """Whether the head has thresholds."""
        return any(layer_of(name) is None and "channels" in kinds for name, kinds in self.kinds.items())

    def renamed(self, rename: Callable[[str], str | None]) -> Sites:
        """The same where the engine has other names."""
        kinds = {rename(name) or name: found for name, found in self.kinds.items()}
        formats = {rename(name) or name: format for name, format in self.formats.items()}
        return replace(self, kinds=kinds, formats=formats)

    def parts(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[Part]:
        """The parts of an engine's layer.

        Args:
            fused: what the engine's layers of a name are made of, as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
        """
        return [
            Part("channels" in self.kinds.get(part, ()), self.formats.get(part, "float"))
            for part in _names(name, fused)
        ]

    def neurons(self, name: str, fused: Mapping[str, Sequence[str]]) -> str | None:
        """Which side of neurons that have thresholds a layer is: "gate_up" or "down"; None if of no such."""
        if "neurons" not in self.kinds.get(name.rpartition(".")[0], ()):
            return None
        own = {part.rpartition(".")[2] for part in _names(name, fused)}
        row = self.architecture
        return "gate_up" if row.up in own else "down" if row.down in own else None


def _names(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    parent, dot, own = name.rpartition(".")
    return [parent + dot + part for part in fused.get(own, [own])]


def sites_of(plan: Plan, config) -> Sites:
    """What of a plan an engine has to do.

    Args:
        config: the Hugging Face config of the model.

    Raises:
        PlanError: a method or an option that works in transformers only. UnsupportedModel: such a family.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None or not row.served:
        known = sorted(name for name, row in ARCHITECTURES.items() if row.served)
        raise UnsupportedModel(
            f"{config.model_type!r} models do not run sparse in vLLM (known: {', '.join(known)}). {INSTEAD}"
        )
    kinds: dict[str, set[str]] = {}
    formats: dict[str, str] = {}
    for step in plan.steps:
        word = step.method
        if word.served is None:
            raise PlanError(f"{word.name} cannot run inside vLLM's layers. {INSTEAD}")
        if word.options().get("dense_prompt"):
            raise PlanError(
                f"{word.name}:dense_prompt=true needs to know which tokens are a prompt, and vLLM mixes those of many "
                f"requests. Sparsify without it, or: {INSTEAD}"
            )
        if word.options().get("batch") == "shared":
            raise PlanError(
                f"{word.name}:batch=shared would make an answer depend on what else is served at the moment. Sparsify "
                f"with batch=own, or: {INSTEAD}"
            )
        for name in step.sites:
            if row.served == "layers" and layer_of(name) is None:
                raise PlanError(
                    f"vLLM has no head of its own in {config.model_type!r} models, and the plan has one ({name}). "
                    f"Sparsify without the site head, or: {INSTEAD}"
                )
            kinds.setdefault(name, set()).add(word.served)
            if word.served == "codes":
                formats[name] = word.format
    return Sites({name: frozenset(found) for name, found in kinds.items()}, row, formats)


INSTEAD = "It runs in transformers: sandcat generate, sandcat serve --engine transformers."


def activation_of(config, row: Architecture) -> str:
    """The activation of a model's neurons, as `ops.sparse_mlp` names it."""
    return ACTIVATIONS[getattr(config.get_text_config(), row.activation)]


def own_part(tensor: Tensor, size: int, rank: int) -> Tensor:
    """What one process has of a tensor whose first dimension is split over all: all of it if that is its size."""
    return tensor if len(tensor) == size else tensor.narrow(0, rank * size, size)


def groups(parts: Sequence[Part], sizes: Sequence[int], thresholds: Sequence[Tensor | None]) -> list[tuple[int, slice]]:
    """Neighbouring parts that are computed alike, as (the first of them, its and the others' outputs).

    Args:
        sizes: outputs of each part.
        thresholds: of each part, one an input channel; None if it has none.
    """
    found: list[tuple[int, slice]] = []
    start = 0
    for index, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if found and part == parts[(first := found[-1][0])] and _same(thresholds[index], thresholds[first]):
            found[-1] = (first, slice(found[-1][1].start, start + size))
        else:
            found.append((index, slice(start, start + size)))
        start += size
    return found


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else one.equal(other)
