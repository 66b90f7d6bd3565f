"""Tensor parallelism: a sparse model split over devices by transformers' own plan, each with its part of the weights.

transformers shards the weights while it loads them (`DistributedConfig(tp_size=...)`), and moves activations around
`nn.Linear`s. Here our modules follow: their kernels get the local part, thresholds are cut as the weights are, and an
MLP that skips neurons computes with its own ones and adds up with the others once. What is dropped stays the same: a
unit's threshold goes where its weights go.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard

from sandcat.errors import UnsupportedModel
from sandcat.layers.core_mlp import CoreMLP
from sandcat.layers.op_module import Kernel, kernel_modules
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import GatedMLP
from sandcat.layers.sparse_module import Thresholded
from sandcat.ops.weights import FORMATS

_LOCAL = "_hf_quantized_needs_local_tp"
"""What tells transformers that a layer computes with local tensors."""


def update_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Where a weight is cut by its inputs, every device has all of what belongs to outputs."""
    names = {re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in model.named_parameters()}
    whole = {tensor for row in FORMATS.values() for tensor in row.whole}
    for name, style in list(plan.items()):
        for tensor in (f"{name}.{tensor}" for tensor in whole):
            if style.startswith("rowwise") and tensor in names:
                plan.setdefault(tensor, "replicated_with_grad_allreduce")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the weights alone."""
    local = any(getattr(module, _LOCAL, False) for module in model.modules())
    return local or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard(model: nn.Module) -> None:
    """Gives our modules of a model that transformers has just loaded in parts what their kernels need.

    Raises:
        UnsupportedModel: a method that looks at all units at once.
    """
    modules = kernel_modules(model)
    for name, module in modules.items():
        if isinstance(module, GatedMLP):
            _shard_mlp(name, module)
    for name, module in modules.items():
        if isinstance(module.__dict__.get("_parameters", {}).get("weight"), DTensor):
            _shard_linear(name, module)


def share_table(table: nn.Module, head: nn.Module) -> None:
    """Lets an embedding table lie where the head that is tied to it has been packed."""
    whole = table.weight
    part = DTensor.from_local(head.weight.data, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape,
                              stride=whole.stride())  # fmt: skip
    table.weight = nn.Parameter(part, requires_grad=whole.requires_grad)


def _shard_linear(name: str, module: Kernel) -> None:
    """A linear layer, around which transformers moves the activations."""
    weight = module.weight
    by_inputs = weight.placements[0] == Shard(1)
    if isinstance(module, SparseLinear) and by_inputs:
        _check_own(name, module)
        module.threshold = _part(module.threshold, weight)
    if "factor_a" in module._buffers:
        cut, dim = ("factor_a", 1) if by_inputs else ("factor_b", 0)
        setattr(module, cut, _part(getattr(module, cut), weight, dim))
    _localise(module, keep=("bias",) if by_inputs else ())  # which transformers adds after adding up
    setattr(module, _LOCAL, True)


def _shard_mlp(name: str, mlp: GatedMLP) -> None:
    """A whole MLP: its projections talk to no other device, it adds up once."""
    down = mlp.down.weight
    if not isinstance(down, DTensor):
        return
    if isinstance(mlp, CoreMLP):
        raise UnsupportedModel(
            f"{name}: coreinfer chooses among all neurons of a prompt, and tensor parallelism gives each device some "
            "of them. Sparsify with cats or teal, or run it on one device."
        )
    _check_own(name, mlp)
    mlp.threshold = _part(mlp.threshold, down)
    if mlp.gate_name == mlp.up_name:
        _pair(mlp.get_submodule(mlp.gate_name))
    for linear in mlp.children():
        if isinstance(linear, SparseLinear) and linear.weight.placements[0] == Shard(1):
            raise UnsupportedModel(f"{name}: a down projection that skips inputs, inside an MLP that skips neurons.")
        _localise(linear)
        vars(linear).pop("forward", None)  # transformers' own, which moves activations
    if mlp.down.bias is not None and down.device_mesh.get_local_rank() > 0:
        mlp.down.bias.data.zero_()  # added once
    group = down.device_mesh.get_group()

    def add_up(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        if y.requires_grad:
            raise UnsupportedModel(
                "a sparse model that is split over devices does not train: run it under torch.no_grad(), and train on "
                "one device each."
            )
        dist.all_reduce(y, group=group)
        return y

    mlp.register_forward_hook(add_up)


def _check_own(name: str, module: Thresholded) -> None:
    if module.batch == "shared":
        raise UnsupportedModel(
            f"{name}: batch=shared makes one list of all units, and tensor parallelism gives each device some of them. "
            "Sparsify with batch=own."
        )


def _localise(module: nn.Module, keep: tuple[str, ...] = ()) -> None:
    for name, parameter in list(module._parameters.items()):
        if isinstance(parameter, DTensor) and name not in keep:
            local = nn.Parameter(parameter.data.to_local(), requires_grad=parameter.requires_grad)
            module._parameters[name] = local


def _pair(fused: nn.Module) -> None:
    """Of a matrix with gate rows before up rows, the rows of this device's neurons, of both."""
    mesh = fused.weight.device_mesh
    for name, parameter in list(fused._parameters.items()):
        if isinstance(parameter, DTensor):
            halves = parameter.data.full_tensor().unflatten(0, (2, -1))
            part = halves.chunk(mesh.size(), 1)[mesh.get_local_rank()].flatten(0, 1).clone()
            fused._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)


def _part(tensor: Tensor, weight: DTensor, dim: int = 0) -> Tensor:
    """What of a tensor belongs to this device, if it is cut as a weight is."""
    mesh = weight.device_mesh
    return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
