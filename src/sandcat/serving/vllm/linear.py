"""What a layer of vLLM loads and runs where the plan has something for it.

vLLM splits the tensors of a checkpoint over processes by its own rules. Thresholds follow what they belong to: those of
input channels their layer's input, those of neurons the outputs of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from sandcat.errors import PlanError
from sandcat.ops.masks import drop_up, gate_bounds
from sandcat.ops.weights import FORMATS, Stored
from sandcat.serving import engine_plan
from sandcat.serving.vllm.layers import Masked, Outputs, Skipping, SkippingUp
from sandcat.serving.vllm.ops import most_sequences

logger = init_logger(f"vllm.{__name__}")
"""Under vLLM's name, whose messages alone it shows."""


@register_weight_loader_v2_supported_method
class SandcatLinear(UnquantizedLinearMethod):
    """A layer of which parts skip.

    Args:
        name: its name in the model.
        side: as `Sites.neurons` has it.
        sequences: how many the server takes at once: layers are laid out for that.
    """

    supports_pre_processed_weights = False

    def __init__(self, name: str, parts: list[engine_plan.Part], side: str | None, activation: str, sequences: int):
        super().__init__()
        self.name, self.parts, self.side = name, parts, side
        self.activation, self.sequences = activation, sequences
        self.tied = False

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ) -> None:  # fmt: skip
        self.sizes, self.dtype = list(output_partition_sizes), params_dtype
        if len(self.parts) < len(self.sizes):  # fused in the checkpoint too
            self.parts = self.parts * len(self.sizes)
        loader, outputs = extra_weight_attrs.pop("weight_loader"), sum(self.sizes)
        formats = {part.format for part in self.parts}
        codes = FORMATS[self.parts[0].format].codes if len(formats) == 1 else None
        stored = codes or params_dtype  # which holds the codes of any format, if they are of several
        weight = torch.empty(outputs, input_size_per_partition, dtype=stored)
        layer.weight = ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        set_weight_attrs(layer.weight, extra_weight_attrs)
        if formats != {"float"}:
            scale = torch.full((outputs, 1), torch.nan, dtype=params_dtype)
            layer.weight_scale = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
        if any(part.channels for part in self.parts):
            layer.threshold = self._thresholds(layer, len(self.parts), input_size_per_partition)
        if self.side == "gate_up":
            layer.neurons = self._thresholds(layer, 1, self.sizes[0])

    def _thresholds(self, layer: nn.Module, rows: int, size: int) -> nn.Parameter:
        """Room for one row of thresholds a part, and what fills it. NaN tells what the checkpoint lacks."""
        parameter = nn.Parameter(torch.full((rows, size), torch.nan, dtype=self.dtype), requires_grad=False)

        def load(param: Tensor, loaded: Tensor, shard_id: str | int | None = None) -> None:
            where: Any = slice(None) if shard_id is None else shard_id
            where = engine_plan.SHARDS[where] if isinstance(where, str) else where
            param.data[where] = engine_plan.own_part(loaded, size, layer.tp_rank).to(param)

        set_weight_attrs(parameter, {"weight_loader": load})
        return parameter

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        self.tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Takes the loaded tensors apart into `layer.outputs`, and frees them."""
        channels: Any = getattr(layer, "threshold", None)
        neurons: Any = getattr(layer, "neurons", None)
        for parameter in (channels, neurons):
            if parameter is not None:
                parameter.data = parameter.data.clamp(min=0) + 0.0  # -0 becomes 0
        thresholds = [channels.data[i] if part.channels else None for i, part in enumerate(self.parts)]
        if self.side == "down":  # what its input has of dropped neurons is 0
            thresholds = [torch.zeros(layer.weight.shape[1], dtype=self.dtype, device=layer.weight.device)]
        found, up = engine_plan.groups(self.parts, self.sizes, thresholds), self.sizes[0]
        up_skips = neurons is not None and self._pays("sparse_up", layer.weight[up:], self.parts[-1].format)
        if up_skips and len(found) == 1:
            found = [(0, slice(0, up)), (1, slice(up, 2 * up))]
        layer.outputs = nn.ModuleList()
        for index, rows in found:
            weight = layer.weight.data[rows]
            weight = weight.clone() if len(found) > 1 else weight  # a view would keep all in memory
            kept, part = thresholds[index], self.parts[index]
            stored, threshold = Stored(weight), None if kept is None else kept.clone()
            if codes := FORMATS[part.format].codes:
                scale = layer.weight_scale.data[rows, 0].clone()
                stored = Stored(weight.to(codes), scale, format=part.format)
            self._check(stored.scale, threshold, neurons)
            if up_skips and rows.start == up:
                layer.outputs.append(SkippingUp(stored, neurons.data[0].clone(), self.activation))
            else:
                layer.outputs.append(self._outputs(stored, threshold))
        if neurons is not None and not up_skips:
            layer.outputs.register_buffer("bounds", gate_bounds(neurons.data[0], self.activation))
        if self.tied:  # the embedding table goes on using it
            layer.weight.data = layer.outputs[0].weight.data
        else:
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        for name in ("weight_scale", "threshold", "neurons"):
            if hasattr(layer, name):
                delattr(layer, name)

    def _outputs(self, weight: Stored, threshold_I: Tensor | None) -> Outputs:
        if threshold_I is not None or weight.scale is not None:
            op = "stored_linear" if threshold_I is None else "sparse_linear"
            if self._pays(op, weight.codes, weight.format):
                return Skipping(weight, threshold_I)
        if weight.codes.device.type != "cpu":
            return Skipping(weight, threshold_I)
        if self.side == "down":  # zeros, in place of thresholds, only tell the kernel what it need not read
            threshold_I = None
        return Masked(weight, threshold_I, dtype=self.dtype, pack=partial(pack, keep=self.tied))

    def _pays(self, op: str, weight_OI: Tensor, format: str) -> bool:
        """Whether a layer is laid out for skipping. A GPU's is in any case: its dense products take both layouts."""
        if weight_OI.device.type != "cpu":
            return True
        pays = self.sequences <= most_sequences(op, weight_OI, self.dtype, format)
        how = "laid out for skipping" if pays else "packed, and only masked"
        logger.info_once("sandcat: %s is %s, for %d sequences at once (--max-num-seqs)", op, how, self.sequences)
        return pays

    def _check(self, *tensors: Tensor | None) -> None:
        if any(bool(t.isnan().any()) for t in tensors if t is not None):
            raise PlanError(
                f"thresholds or scales of {self.name} are missing from the checkpoint. Sparsify again; a folder that "
                "was saved without sandcat keeps the plan but loses such tensors."
            )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x_TI, start = x.reshape(-1, x.shape[-1]), 0
        found: list[Tensor] = []
        for outputs in layer.outputs:
            end = start + outputs.size
            own_bias = None if bias is None else bias[start:end]
            if isinstance(outputs, SkippingUp):
                found.append(outputs(x_TI, found[0] if len(found) == 1 else torch.cat(found, -1), own_bias))
            else:
                found.append(outputs(x_TI, own_bias))
            start = end
        y_TO = found[0] if len(found) == 1 else torch.cat(found, -1)
        if self.side == "gate_up" and not isinstance(layer.outputs[-1], SkippingUp):
            drop_up(y_TO, layer.outputs.bounds)
        return y_TO.view(*x.shape[:-1], -1)


class Table(QuantizeMethodBase):
    """An embedding table that may be stored by channels, as a head that shares its weight skips them. (vLLM's own
    method tells its kernels that a table is stored row by row.)"""

    def create_weights(self, layer: nn.Module, *sizes, **options) -> None:
        UnquantizedEmbeddingMethod().create_weights(layer, *sizes, **options)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return F.embedding(ids, layer.weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


def pack(module: nn.Module, *, keep: bool) -> Callable[[Tensor], Tensor]:
    """Packs a module's weight as vLLM does on a CPU, and drops it unless it is to be kept; what multiplies by it."""
    dispatch_cpu_unquantized_gemm(module, remove_weight=not keep)
    return lambda x: module.cpu_linear(x, module.weight, None)
