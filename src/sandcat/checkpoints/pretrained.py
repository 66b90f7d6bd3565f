"""`save_pretrained` of a sparse model: it saves what loading will build, and a state that it is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sandcat.checkpoints import tensor_parallel
from sandcat.checkpoints.agreement import check_state
from sandcat.errors import PlanError, UnsupportedModel
from sandcat.models.in_place import InPlace
from sandcat.models.quantised import FLOATS, method_of
from sandcat.models.unwrapped import check_unwrapped
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan


def take_over_saving(model: nn.Module) -> None:
    """Gives a sparse model a `save_pretrained` of its own, and takes its quantizer out.

    While a quantizer is there, transformers saves the state that this one gives, and never the caller's.
    """
    model.hf_quantizer = None
    keep_floats(model)
    model.save_pretrained = SavePretrained(model)


def keep_floats(model: nn.Module) -> None:
    """Lets a model that transformers turned into floats while loading be saved as floats.

    It remembers how it changed what it read, to undo that when it saves: weights read as fp8 would be fp8 again in the
    files, under a config that says nothing of it. What was read from GGUF it does not save at all.
    """
    if method_of(getattr(model.config, "quantization_config", None)) in FLOATS:
        del model.config.quantization_config
        model.hf_quantizer = None

    def widens(step: Any) -> bool:
        return any(hasattr(operation, "hf_quantizer") for operation in getattr(step, "operations", ()))

    remembered = getattr(model, "_weight_conversions", None) or []
    kept = [step for step in remembered if not widens(step)]
    if len(kept) < len(remembered):
        model._weight_conversions = kept


class SavePretrained(InPlace):
    """It saves what loading will build, and a state that it is given."""

    name = "save_pretrained"

    def __call__(
        self, save_directory, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """As that of transformers, which it calls; of a model with adapters it saves those alone, as there.

        Args:
            state_dict: the tensors to save in place of the model's own; those of the plan have to be among them.
            is_main_process: of several processes the others give, as a rule, an empty state, and write nothing.

        Raises:
            PlanError: what is to be saved is not what loading will build.
            UnsupportedModel: unmerged adapters, or a model that is split over devices.
        """
        model, save = self.model, self.__wrapped__
        if getattr(model, "_hf_peft_config_loaded", False):
            return save(save_directory, is_main_process, state_dict, **options)
        check_unwrapped(model)
        if state_dict is None and tensor_parallel.is_sharded(model):
            raise UnsupportedModel("this model is split over devices: save the whole one, in one process.")
        state = dict(model.state_dict() if state_dict is None else state_dict)
        if is_main_process:
            plan = getattr(getattr(model.config, "quantization_config", None), "plan", None)
            if not isinstance(plan, Plan):
                raise PlanError("this model is sparse, and its config has no plan, without which it cannot be loaded.")
            check_state(model, plan, state)
        _forget_tied(model, state)
        return save(save_directory, is_main_process, state, **options)


def _forget_tied(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Leaves a tied matrix once in the state: where it is stored by channels, transformers cannot do it."""
    *_, head = ModelView(model).sites()
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    own, other = state.get(f"{head.name}.weight"), state.get(f"{name}.weight")
    shared = own is not None and other is not None and own.data_ptr() == other.data_ptr()
    if shared and head.module.weight is table.weight:
        del state[f"{head.name}.weight"]
