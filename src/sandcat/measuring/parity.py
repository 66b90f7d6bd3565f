"""Whether kernels compute what their references do: what is wrong is not timed. Steps: step_parity.py."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sandcat.decoding.decoder import Decoder
from sandcat.errors import ParityError
from sandcat.layers.op_module import Kernel, kernel_modules
from sandcat.measuring.edges import off_the_edge, thresholded, thresholds_restored

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Relative RMS difference of a sparse module's output, by its kernel against by its reference."""


@torch.inference_mode()
def parity_error(sparse: nn.Module, ids_BT: Tensor) -> float:
    """How far the kernels are from their references: the worst relative RMS difference of a sparse module's output.

    Each module is given, twice, what it gets in a decode step after `ids_BT`, so that no error of a module before it
    counts: in a deep model such errors grow, and one more or less neuron at a threshold is then no error of a kernel.

    Raises:
        ParityError: above `TOLERANCE` for the model's dtype, or not a number.
    """
    decoder = Decoder(sparse, ids_BT.shape[1], batch=len(ids_BT), compile=None, capture=False)
    decoder.prefill(ids_BT[:, :-1])
    errors = [0.0]
    with thresholds_restored(thresholded(sparse)):
        with off_the_edge(sparse):
            decoder.step(ids_BT[:, -1:])
        decoder.rewind(ids_BT.shape[1] - 1)
        with ExitStack() as stack:  # within a step, as what a module computes may follow from what that comes after
            for module in kernel_modules(sparse).values():
                hook = module.register_forward_pre_hook(lambda m, args: errors.append(_error(m, args[0])))
                stack.callback(hook.remove)
            decoder.step(ids_BT[:, -1:])
    return max(errors)


def _error(module: Kernel, x: Tensor) -> float:
    found = module.forward(x).double()
    module.by_reference = True  # not those inside it, so that both choose by the same activations
    try:
        want = module.forward(x).double()
    finally:
        module.by_reference = False
    error, tolerance = (
        float((found - want).norm() / want.norm().clamp_min(torch.finfo(x.dtype).tiny)),
        TOLERANCE[x.dtype],
    )
    if not error <= tolerance:
        raise ParityError(
            f"the {module.kernel(x.device)} kernel of {module.op} differs from its reference by {error:.1e} (relative "
            f"RMS), and {tolerance:.0e} is allowed. Nothing is timed. Please report model and machine."
        )
    return error
