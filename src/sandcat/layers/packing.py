"""How weights lie: laid out for the kernels, and at cache lines."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from sandcat.layers.generation import follow_generation
from sandcat.layers.head_plan import follow_head_plans
from sandcat.layers.sparse_module import follow_prompts, sparse_modules
from sandcat.models.host_memory import FilePages
from sandcat.models.view import ModelView


def pack(model: nn.Module, pages: FilePages | None = None) -> None:
    """Lays the weights out for the kernels, once, and has the modules follow the model's forwards.

    Args:
        pages: of the files that the model was just loaded from, to give back what has moved.
    """
    for module in sparse_modules(model).values():
        module.pack()
        if pages:
            pages.give_back()
    follow_head_plans(model)
    prompts = follow_prompts(ModelView(model).decoder)
    if prompts is not None:
        follow_generation(model, prompts)
    align(model, pages)


def align(model: nn.Module, pages: FilePages | None = None) -> None:
    """Moves tensors to where cache lines begin; a file mapped into memory leaves them anywhere.

    Vector loads that straddle lines are slower, and sums come out in another order: without this, the logits of a model
    differ in the last bit before it is saved and after it is loaded.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, DTensor) and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
            if pages:
                pages.give_back()
