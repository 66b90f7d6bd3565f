"""What is made sparse or saved is the model itself: no wrapper, and nothing between its layers that is not its own."""

from __future__ import annotations

from torch import nn

from sandcat.errors import UnsupportedModel


def check_unwrapped(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModel: the model has adapters that are not merged, or is a wrapper around one.
    """
    from transformers import PreTrainedModel  # which may itself be importing us, to learn of plans

    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None or hasattr(model, "peft_config"):
        where = f" around {adapted}" if adapted else ""
        raise UnsupportedModel(
            f"this model has adapters{where} that are not merged into its weights. Merge them first: model = "
            "sandcat.adapters.merge(model), which is merge_and_unload() of PEFT. (Adapters alone are saved by "
            "model.save_pretrained.)"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"a {type(model).__name__} is no model of transformers. Give the one inside it: ._orig_mod of what "
            "torch.compile gave, .module of DataParallel."
        )
