"""The model families: one row of data each, and the view that hands out their parts.

This is the only file that knows the module names of Hugging Face models. To support another family, add one row to
`ARCHITECTURES`; the contract tests pick it up (tests/tiny.py builds a small random model of every row).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from sandcat.errors import UnsupportedModel
from sandcat.models.families import Architecture, activation, family
from sandcat.models.quantised import START


@dataclass(frozen=True)
class Site:
    """One place in a model where a method can act.

    `name` is the module path in the model, `kind` what it is ("attention"; its "cache", where nothing stands at first,
    and `module` is the attention; "mlp"; the name of a linear layer in `linear_kinds`; or "head"), `layer` its layer's
    index (of the head: one past the last), `module` what stands there now, `activation` that of the MLP as
    `ops.activations` names it, `architecture` the row of the family.
    """

    name: str
    kind: str
    layer: int
    module: nn.Module
    activation: str
    architecture: Architecture


@dataclass(frozen=True)
class Block:
    """The parts of a decoder layer that a family with `fused_step` has."""

    input_norm: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    scaling: float
    window: int | None
    """Positions that attention sees, the own included; None for all."""
    self_attn: nn.Module
    mlp_norm: nn.Module
    mlp: Site
    """What stands there, of whatever kind."""

    @property
    def attention(self) -> list[nn.Module]:
        """q, k, v and o."""
        return [self.q, self.k, self.v, self.o]


class ModelView:
    """A Hugging Face causal language model seen as layers and sites; the only one that replaces modules.

    Args:
        device: where layers are computed, one at a time, if that is not where the weights lie; see `offload.py`.

    Raises:
        UnsupportedModel: no row for `model.config.model_type`, the row does not fit the model, or its head is none of a
            language model's.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None):
        self.model = model
        self.architecture = family(getattr(model, "config", None))
        if model.get_output_embeddings() is None:
            raise UnsupportedModel(
                f"a {type(model).__name__} has no head that gives the next token, and what is made sparse is the "
                "decoding of a language model. Load it with AutoModelForCausalLM. To put another head on the weights "
                "of a sparse folder, take the dense model: sandcat.load(FOLDER, dense=True)[0].save_pretrained(DENSE)."
            )
        self.offloaded = device is not None
        self.device = device if self.offloaded else model.device
        self.config = model.config
        self.text_config = self.config.get_text_config()
        try:
            self.layers: list[nn.Module] = list(model.get_submodule(self.architecture.layers))
        except AttributeError:
            raise UnsupportedModel(
                f"a {type(model).__name__} of model_type {self.config.model_type!r} has no "
                f"{self.architecture.layers!r}, where its row in sandcat/models/families.py expects the decoder "
                "layers. Load it with AutoModelForCausalLM, or correct the row."
            ) from None

    @property
    def decoder(self) -> nn.Module:
        """What holds the layers, the final norm and the embedding table: the text model, without a vision tower."""
        return self.model.get_submodule(self.architecture.layers.rpartition(".")[0])

    def is_stock(self, module: nn.Module) -> bool:
        """Whether a module is just what transformers has for this family, or a container: no subclass of that, which
        may compute something else."""
        model_type = self.config.model_type
        activation = getattr(self.text_config, self.architecture.activation, None)
        return (
            type(module).__module__ == f"transformers.models.{model_type}.modeling_{model_type}"
            or type(module) in (nn.ModuleList, nn.Embedding)
            or (activation in ACT2FN and type(module) is type(ACT2FN[activation]))
        )

    @property
    def stages(self) -> list[Callable[..., Tensor]]:
        """What a token goes through, in order: the layers, then the final norm with the head that stands there then."""
        return [*self.layers, lambda state: self.model.get_output_embeddings()(self.decoder.norm(state))]

    def parts(self, stage: int) -> list[nn.Module]:
        """The modules that a stage runs."""
        tail = [self.decoder.norm, self.model.get_output_embeddings()]
        return tail if stage == len(self.layers) else [self.layers[stage]]

    def layer_name(self, layer: int) -> str:
        """The module name of a decoder layer."""
        return f"{self.architecture.layers}.{layer}"

    @property
    def linear_kinds(self) -> dict[str, str]:
        """The linear layers that every decoder layer has, kind -> path: "q", ..., "down"; a fused one once, "qkv"."""
        row = self.architecture
        kinds: dict[str, str] = {}
        for parent, names in ((row.attention, ("q", "k", "v", "o")), (row.mlp, ("gate", "up", "down"))):
            paths: dict[str, list[str]] = {}
            for name in names:
                paths.setdefault(f"{parent}.{getattr(row, name)}", []).append(name)
            kinds |= {("_" if "gate" in fused else "").join(fused): path for path, fused in paths.items()}
        return kinds

    def sites(self) -> Iterator[Site]:
        """Every place where a method can act, layer by layer, in the order in which a layer computes them; the head."""
        for mlp in self.mlps():
            name, layer = self.layer_name(mlp.layer), self.layers[mlp.layer]
            linears = [
                replace(mlp, name=f"{name}.{path}", kind=kind, module=layer.get_submodule(path))
                for kind, path in self.linear_kinds.items()
            ]
            attention = f"{name}.{self.architecture.attention}"
            yield replace(mlp, name=attention, kind="attention", module=self.model.get_submodule(attention))
            yield replace(mlp, name=f"{attention}.cache", kind="cache", module=self.model.get_submodule(attention))
            late = [site for site in linears if site.kind in ("up", "down", "gate_up")]
            yield from (site for site in linears if site not in late)
            yield mlp
            yield from late
        head = self.model.get_output_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is head)
        yield replace(mlp, name=name, kind="head", layer=len(self.layers), module=head)

    def current(self, site: Site) -> Site:
        """The site with what stands there now."""
        return site if site.kind == "cache" else replace(site, module=self.model.get_submodule(site.name))

    def own_config(self) -> None:
        """Gives the model a config of its own: other models, and the caller, may hold the one that it was made from."""
        copies: dict[int, Any] = {}
        copy.deepcopy(self.config, copies)
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    setattr(module, name, copies.get(id(value), value))
        self.config = self.model.config
        self.text_config = self.config.get_text_config()

    def untie(self) -> None:
        """Tells transformers that the head has a weight of its own, beside the embedding table."""
        self.config.tie_word_embeddings = self.text_config.tie_word_embeddings = False

    def mlps(self) -> Iterator[Site]:
        """The gated MLP of every layer, in order."""
        row = self.architecture
        for site in self._mlps():
            layer, mlp = site.layer, site.module
            missing = [part for part in (row.gate, row.up, row.down) if not hasattr(mlp, part)]
            if missing:
                raise UnsupportedModel(
                    f"layer {layer} of this {self.config.model_type!r} model has no {', '.join(missing)} in its "
                    f"{type(mlp).__name__}: it is no plain gated MLP (a mixture of experts is not supported)."
                )
            yield site

    def _mlps(self) -> Iterator[Site]:
        """What stands at the place of the MLP of every layer."""
        row = self.architecture
        name = activation(getattr(self.text_config, row.activation))
        for layer, module in enumerate(self.layers):
            yield Site(f"{self.layer_name(layer)}.{row.mlp}", "mlp", layer, module.get_submodule(row.mlp), name, row)

    def linears_of(self, site: Site) -> dict[str, nn.Module]:
        """The linear layers whose weights a method at a site reads, by their names in the model: the site's own, the
        three of an MLP, and none of attention, which goes on calling them."""
        if site.kind in ("attention", "cache"):
            return {}
        if site.kind != "mlp":
            return {site.name: site.module}
        row = site.architecture
        return {f"{site.name}.{part}": getattr(site.module, part) for part in (row.gate, row.up, row.down)}

    def skipped_at(self, site: Site) -> list[str]:
        """Names of the linear layers of which a site skips parts; of an MLP not the gate, unless it is fused. Attention
        stands for itself."""
        if site.kind in ("attention", "cache"):
            return [site.name]
        row = site.architecture
        dense = f"{site.name}.{row.gate}" if row.gate != row.up else None
        return [name for name in self.linears_of(site) if name != dense]

    def check_plain(self, site: Site) -> None:
        """
        Raises:
            UnsupportedModel: the linear layers at the site are not plain ones, whose weights the kernels read.
        """
        for name, linear in self.linears_of(site).items():
            if hasattr(getattr(linear, "weight", None), "device_mesh"):
                raise UnsupportedModel(
                    f"{name} is split over devices. Sparsify the whole model in one process (with --offload if it is "
                    "larger than a device), save it, and load that in parts."
                )
            offloaded = getattr(getattr(linear, "_hf_hook", None), "offload", False)
            hooked = linear._forward_hooks or linear._forward_pre_hooks or offloaded
            if type(linear) is not nn.Linear or hooked:
                raise UnsupportedModel(
                    f"{name} is a {type(linear).__name__}{' with hooks' if hooked else ''}, and the kernels read plain "
                    "nn.Linear weights: merge adapters first, load without offloading."
                )
            if type(linear.weight) is not nn.Parameter or linear.weight.itemsize < 2:
                weight = linear.weight
                raise UnsupportedModel(
                    f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}, and the kernels read plain "
                    f"floats of 16 or 32 bits. {START}"
                )

    def blocks(self) -> Iterator[Block]:
        """Every layer's parts, for families with `fused_step`."""
        for layer, mlp in zip(self.layers, self._mlps(), strict=True):
            attention = layer.get_submodule(self.architecture.attention)
            window = getattr(self.text_config, "sliding_window", None)
            row = self.architecture
            q, k, v, o = (getattr(attention, name) for name in (row.q, row.k, row.v, row.o))
            yield Block(
                layer.input_layernorm, q, k, v, o,
                getattr(attention, "q_norm", None), getattr(attention, "k_norm", None), attention.scaling,
                getattr(attention, "sliding_window", window), attention, layer.post_attention_layernorm, mlp,
            )  # fmt: skip

    @contextmanager
    def only(self, layers: slice) -> Iterator[None]:
        """Within this context the model has these of its layers only, and counts them from 0."""
        every, count = self.decoder.layers, self.text_config.num_hidden_layers
        chosen = every[layers]
        before = [layer.get_submodule(self.architecture.attention).layer_idx for layer in chosen]

        def number(indices: Iterable[int]) -> None:
            for layer, index in zip(chosen, indices, strict=False):
                layer.get_submodule(self.architecture.attention).layer_idx = index

        self.decoder.layers, self.text_config.num_hidden_layers = chosen, len(chosen)
        number(range(len(chosen)))
        try:
            yield
        finally:
            self.decoder.layers, self.text_config.num_hidden_layers = every, count
            number(before)

    def replace(self, site: Site, module: nn.Module) -> None:
        """Puts `module` where `site` is. The only lasting assignment of modules in the library."""
        parent, _, child = site.name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)
