"""How transformers learns of plans: a quantization config that carries one, a quantizer that builds what it says."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sandcat.checkpoints import tensor_parallel
from sandcat.checkpoints.pretrained import take_over_saving
from sandcat.errors import PlanError
from sandcat.layers.fingerprint import agrees, own_tensors
from sandcat.layers.op_module import Kernel, kernel_modules
from sandcat.layers.packing import pack
from sandcat.models.host_memory import FilePages
from sandcat.models.view import ModelView
from sandcat.plans.plan import QUANT_METHOD, Plan


@register_quantization_config(QUANT_METHOD)
class SandcatConfig(QuantizationConfigMixin):
    """The plan, in the form in which transformers carries it inside a model's config."""

    def __init__(self, **data):
        self.quant_method = QUANT_METHOD
        data.pop("quant_method", None)
        self.plan = Plan.from_json(data)

    def to_dict(self) -> dict:
        return self.plan.to_config()

    def __iter__(self):
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class SandcatQuantizer(HfQuantizer):
    """Lays out the sparse modules before the tensors are read, and packs them afterwards."""

    requires_calibration = True
    is_trainable = True  # prompts run by differentiable products, and ops have the gradients of their references
    is_compileable = True
    is_qat_trainable = False

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.quantization_config.plan.lay_out(ModelView(model))
        tensor_parallel.update_plan(model, model.tp_plan)

    def _process_model_after_weight_loading(self, model, **kwargs):
        view, pages = ModelView(model), FilePages(model)
        for name, expected in self.quantization_config.plan.fingerprints.items():
            check_loaded(name, model.get_submodule(name), expected)
        for module in kernel_modules(model).values():
            if module.format != "float":
                for parameter in (p for n, p in module.named_parameters(recurse=False) if n != "bias"):
                    parameter.requires_grad_(False)  # transformers asks it of all floats
        *_, head = view.sites()
        table = model.get_input_embeddings()
        tied = head.module.weight is table.weight and isinstance(head.module, Kernel)
        if tensor_parallel.is_sharded(model):
            tensor_parallel.shard(model)
        pack(model, pages)
        if tied and head.module.weight is not table.weight:
            tensor_parallel.share_table(table, head.module)
        model.is_quantized = False  # its weights are not: .float(), .half() and .to() work
        take_over_saving(model)
        return model


def check_loaded(name: str, module: nn.Module, expected: dict[str, float]) -> None:
    """
    Args:
        expected: the module's `fingerprint` when its plan was made.

    Raises:
        PlanError: a module's weights lie elsewhere (offloaded), or its tensors are not those of the plan.
    """
    if any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
        raise PlanError(
            f"the weights of {name} were offloaded to the host or to disk, where the kernels cannot read them. Load "
            "the sparse model onto devices that hold it whole, as with device_map='cuda'."
        )
    flagged = any(_was_read(parameter) for parameter in module.parameters())
    for key, tensor in own_tensors(module).items():
        missing = key not in expected or (flagged and not _was_read(getattr(module, key)))
        if missing or not agrees(tensor, expected[key]):
            raise PlanError(
                f"the tensor {name}.{key} is missing from the checkpoint, or not the one that its plan was made with. "
                "Sparsify again; a folder that was saved without sandcat keeps the plan but loses such tensors."
            )


def _was_read(tensor: Tensor) -> bool:
    """transformers marks what it read from a checkpoint; the rest is memory left over, which may hold anything."""
    return getattr(tensor, "_is_hf_initialized", False)


def attach(model: nn.Module, plan: Plan) -> None:
    """Writes the plan into a model that was sparsified in place, so that `save_pretrained` saves it."""
    model.config.quantization_config = SandcatConfig(**plan.to_json())
    model.quantization_method = QUANT_METHOD
    take_over_saving(model)


def planned(model: nn.Module) -> Plan:
    """The plan of a sparse model.

    Raises:
        PlanError: it is dense.
    """
    plan = plan_of(model)
    if plan is None:
        raise PlanError("this model is dense: it carries no plan. Make it sparse with sandcat.sparsify.")
    return plan


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model carries; None for a dense one."""
    config = getattr(model.config, "quantization_config", None)
    return config.plan if isinstance(config, SandcatConfig) else None
