"""Whether what is about to be saved is what loading will build of the config and the plan beside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sandcat.errors import PlanError
from sandcat.layers.fingerprint import agrees
from sandcat.layers.op_module import kernel_modules
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan

FIRST = (
    "What changes modules comes before a model is made sparse (resize_token_embeddings, set_output_embeddings, "
    "torch.compile of a layer): do it to the dense model, and sparsify that."
)


def check_state(model: nn.Module, plan: Plan, state: dict[str, Tensor]) -> None:
    """Compares a model, and the tensors that will be in its files, with what loading makes of its config and plan.

    Args:
        state: whole tensors, by name.

    Raises:
        PlanError: another module stands at a site, or a tensor is missing, has another shape, or is not the plan's.
    """
    twin = laid_out(model, plan)
    _check_modules(model, twin)
    optional = {*twin.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    for name, tensor in twin.state_dict().items():
        if name not in state:
            if name in optional:
                continue
            raise PlanError(f"{name} is missing from what is to be saved, and loading needs it. {FIRST}")
        if _form(state[name]) != _form(tensor):
            raise PlanError(
                f"plan and config no longer fit the model: {name} is {_form(state[name])}, and loading makes it "
                f"{_form(tensor)}. {FIRST}"
            )
    for site, marks in plan.fingerprints.items():
        for key, mean in marks.items():
            tensor = state[f"{site}.{key}"]
            if not tensor.is_meta and not agrees(tensor, mean):
                raise PlanError(
                    f"{site}.{key} is not what the plan was made with, and loading would refuse it. Sparsify again."
                )


def laid_out(model: nn.Module, plan: Plan) -> nn.Module:
    """What loading builds of a model's config and of its plan, without memory for the numbers."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    plan.lay_out(ModelView(twin))
    return twin


def _check_modules(model: nn.Module, twin: nn.Module) -> None:
    stand, built = ({name: type(module).__name__ for name, module in net.named_modules()} for net in (model, twin))
    for name in {**kernel_modules(twin), **kernel_modules(model)}:
        if stand.get(name) != built.get(name):
            raise PlanError(
                f"the plan no longer fits the model: it says {built.get(name, 'nothing')} at {name}, and there is "
                f"{stand.get(name, 'nothing')}. {FIRST}"
            )


def _form(tensor: Tensor) -> str:
    is_number = tensor.is_floating_point() and tensor.itemsize > 1  # codes may be floats of one byte
    return f"{'floats' if is_number else 'codes'} {list(tensor.shape)}"
