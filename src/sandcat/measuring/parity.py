"""Whether kernels and steps compute what they should: what is wrong is not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sandcat.decoding.decoder import Decoder
from sandcat.errors import ParityError
from sandcat.layers.op_module import Kernel, kernel_modules
from sandcat.layers.sparse_module import Thresholded
from sandcat.models.view import ModelView

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Relative RMS difference of a sparse module's output, by its kernel against by its reference."""
STEP_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
"""The same of a whole step's logits, compiled or fused against eager: it finds a wrong step, not one that rounds
elsewhere, which in a deep model of random weights comes to 0.2 in bfloat16 (unrelated logits differ by 1.4)."""


@torch.inference_mode()
def parity_error(sparse: nn.Module, ids_BT: Tensor) -> float:
    """How far the kernels are from their references: the worst relative RMS difference of a sparse module's output.

    Each module is given, twice, what it gets in a decode step after `ids_BT`, so that no error of a module before it
    counts: in a deep model such errors grow, and one more or less neuron at a threshold is then no error of a kernel.

    Raises:
        ParityError: above `TOLERANCE` for the model's dtype, or not a number.
    """
    inputs: dict[nn.Module, Tensor] = {}
    modules = kernel_modules(sparse).values()
    decoder = Decoder(sparse, ids_BT.shape[1], batch=len(ids_BT))
    decoder.prefill(ids_BT[:, :-1])
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for m in modules]
    try:
        sparse(ids_BT[:, -1:].to(sparse.device), past_key_values=decoder.cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    worst = 0.0
    for module, x in inputs.items():
        with _threshold_off_the_edge(module, x):
            found = module(x).double()
            module.by_reference = True  # not those inside it, so that both choose by the same activations
            try:
                want = module(x).double()
            finally:
                module.by_reference = False
        error = float((found - want).norm() / want.norm().clamp_min(torch.finfo(x.dtype).tiny))
        worst = max(worst, error) if error == error else error
        if not error <= TOLERANCE[sparse.dtype]:
            raise ParityError(
                f"the {module.kernel(sparse.device)} kernel of {module.op} differs from its reference by "
                f"{error:.1e} (relative RMS), and {TOLERANCE[sparse.dtype]:.0e} is allowed. Nothing is timed. Please "
                "report model and machine."
            )
    return worst


@contextlib.contextmanager
def _threshold_off_the_edge(module: Kernel, x: Tensor) -> Iterator[None]:
    """Keeps, within this context, the neurons whose activation is a rounding away from its threshold.

    There the order in which a kernel adds decides whether the neuron is kept, so two right answers differ by a neuron.
    """
    if not isinstance(module, Thresholded):
        yield
        return
    threshold = module.threshold
    near = (module.scores(x) - threshold).abs() <= 2 * torch.finfo(x.dtype).eps * threshold
    module.threshold = torch.where(near.flatten(0, -2).any(0), -1, threshold)
    try:
        yield
    finally:
        module.threshold = threshold


def check_step(
    name: str,
    logits: Tensor,
    eager: Tensor,
    model: nn.Module,
    prompt: Tensor,
    ids_B1: Tensor,
    compile: str | None,
    *,
    by_layers: bool,
) -> None:
    """Compares the logits of a compiled or fused step with those of the eager one.

    Args:
        prompt, ids_B1: what the step came after, and what it was fed.
        compile: as `Decoder` takes it.
        by_layers: where they differ, let `check_by_layers` decide.

    Raises:
        ParityError: it is not the eager one by more than roundings can grow to.
    """
    error = error_of(logits, eager)
    if by_layers and error > STEP_TOLERANCE[model.dtype]:
        check_by_layers(model, prompt, ids_B1, name, compile)
    elif not error <= STEP_TOLERANCE[model.dtype]:
        raise ParityError(
            f"the {name} step differs from the eager one by {error:.1e} (relative RMS of the logits), and "
            f"{STEP_TOLERANCE[model.dtype]:.0e} is allowed. Nothing is timed. Please report model and machine."
        )


def check_by_layers(model: nn.Module, prompt: Tensor, ids_B1: Tensor, name: str, compile: str | None) -> None:
    """Compares fused or compiled steps with eager ones, of the model cut down to two layers at a time.

    Where a rounding decides what is skipped, a deep model makes two right steps differ at will: random weights above
    all. Over a few layers they stay together, and a wrong step still does not. A compiler, which takes its time, is
    asked for the first few layers only. Where sequences share what is skipped, a rounding of one changes what all of
    them use: then they are compared with all units kept, and as copies of the first sequence, which skip as it does
    alone. A head that skips makes much of what the layers' roundings have come to: it is compared with all units of the
    layers kept, and these with all of the head's.

    Raises:
        ParityError: they don't.
    """
    view, at_once = ModelView(model), 2
    x_B1H = torch.empty(len(ids_B1), 1, 0, dtype=model.dtype, device=model.device)
    thresholded = [module for module in kernel_modules(model).values() if isinstance(module, Thresholded)]
    copies, fed = prompt[:1].expand_as(prompt), ids_B1[:1].expand_as(ids_B1)
    heads = [module for module in thresholded if module is view.model.get_output_embeddings()]
    others = [module for module in thresholded if module not in heads]
    for start in range(0, len(view.layers) if compile == "fused" else 1, at_once):
        part, inputs = f"{name} (layers {start} to {start + at_once - 1} alone)", (prompt, ids_B1)
        with view.only(slice(start, start + at_once)):
            if any(module.shares(x_B1H) for module in thresholded):
                with _all_kept(thresholded):
                    _compare(f"{part[:-1]}, all kept)", model, *inputs, compile)
                part, inputs = f"{part[:-1]}, of copies)", (copies, fed)
            for kept in (heads, others) if heads else ([],):
                with _all_kept(kept):
                    _compare(part, model, *inputs, compile)


def _compare(name: str, model: nn.Module, prompt: Tensor, ids_B1: Tensor, compile: str | None) -> None:
    logits = []
    for mode in (None, compile):
        decoder = Decoder(model, prompt.shape[1] + 1, batch=len(ids_B1), compile=mode, capture=False)
        decoder.prefill(prompt)
        logits.append(decoder.step(ids_B1).double())
    check_step(name, logits[1], logits[0], model, prompt, ids_B1, compile, by_layers=False)


@contextlib.contextmanager
def _all_kept(modules: list[Thresholded]) -> Iterator[None]:
    thresholds = [module.threshold for module in modules]
    for module in modules:
        module.threshold = torch.full_like(module.threshold, -1)
    try:
        yield
    finally:
        for module, threshold in zip(modules, thresholds, strict=True):
            module.threshold = threshold


def error_of(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())
