"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): it learns to serve plans.

`vllm serve FOLDER` is all that a folder of `sandcat sparsify` needs then. docs/serving.md says what runs how.
"""

from __future__ import annotations

from sandcat.errors import SandcatError
from sandcat.plans.plan import QUANT_METHOD


def register() -> None:
    """Tells vLLM of `quant_method: "sandcat"`. May be called any number of times.

    Raises:
        SandcatError: a vLLM whose layers this sandcat does not know.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    try:
        from sandcat.serving.vllm import quantization
    except ImportError as error:
        raise SandcatError(
            f"this vLLM lacks what sandcat builds on ({error}). It was made with vLLM 0.32: pip install 'vllm>=0.32'."
        ) from error
    quantization.register()
