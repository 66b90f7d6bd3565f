"""Models whose weights others have quantised: what they are, and what to do about it."""

from __future__ import annotations

from typing import Any

from sandcat.errors import PlanConflict

FLOATS = ("gguf",)
"""Methods whose weights are floats once transformers has loaded them, though the config goes on naming them."""
WIDENED = (*FLOATS, "fp8", "mxfp4", "mxfp8", "nvfp4")
"""Those and methods whose weights it turns into floats where it cannot run them, and then forgets."""
START = (
    "The floats that its weights were made from are not in it: start from the model that it was made from, which its "
    "README.md names as a rule. (The word int8 in a recipe makes its weights int8.)"
)


def method_of(quantisation: Any) -> str:
    """The quant_method of a quantization_config, from a file or in memory; "" if it has none."""
    method = _entry(quantisation, "quant_method")
    if method is None and (_entry(quantisation, "load_in_8bit") or _entry(quantisation, "load_in_4bit")):
        return "bitsandbytes"  # whose old folders do not say so
    return str(getattr(method, "value", method or ""))


def quantisation_in(config: dict[str, Any]) -> Any:
    """What the content of a config.json says of quantised weights; None if they are not."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config")
    return inner if found is None else found


def check_floats(quantisation: Any, *, loaded: bool) -> None:
    """
    Args:
        quantisation: a quantization_config that is no plan; None if there is none.
        loaded: it is that of a model in memory, not of a file.

    Raises:
        PlanConflict: the weights are quantised, and stay so.
    """
    if quantisation is not None and method_of(quantisation) not in (FLOATS if loaded else WIDENED):
        raise PlanConflict(f"this model is quantised already ({said(quantisation)}). {START}")


def said(quantisation: Any) -> str:
    """A quantization_config in a word or two: "gptq, 4 bits"."""
    bits = _entry(quantisation, "bits") or 4 * bool(_entry(quantisation, "load_in_4bit"))
    bits = bits or 8 * bool(_entry(quantisation, "load_in_8bit"))
    method = f"{method_of(quantisation):.40}" or "in a way that its config.json does not name"
    return f"{method}, {bits} bits" if type(bits) is int and bits else method


def _entry(quantisation: Any, key: str) -> Any:
    return quantisation.get(key) if isinstance(quantisation, dict) else getattr(quantisation, key, None)
