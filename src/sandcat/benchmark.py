"""Speed: seconds and bytes a token, dense beside sparse, interleaved. What fails its parity check is not timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sandcat.architectures import ModelView
from sandcat.errors import ParityError
from sandcat.generate import Decoder
from sandcat.layers.int8 import scale_of
from sandcat.layers.kernel import Kernel, kernel_modules
from sandcat.layers.sparse import Thresholded, sparse_modules
from sandcat.progress import track

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Relative RMS difference of a sparse module's output, by its kernel against by its reference."""
STEP_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
"""The same of a whole step's logits, compiled or fused against eager: it finds a wrong step, not one that rounds
elsewhere, which in a deep model of random weights comes to 0.2 in bfloat16 (unrelated logits differ by 1.4)."""


class Timer:
    """Runs several functions in turn and keeps the seconds each took. On a GPU each is captured in a CUDA graph."""

    def __init__(self, variants: dict[str, Callable[[], object]], device: torch.device):
        self.device = device
        self.variants = {name: self._prepared(run) for name, run in variants.items()}

    def _prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        if self.device.type != "cuda":
            return run
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _seconds(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def medians(self, runs: int) -> dict[str, float]:
        """The median seconds of each variant over interleaved runs, the first round left out."""
        taken: dict[str, list[float]] = {name: [] for name in self.variants}
        for _ in range(runs + 1):
            for name, run in self.variants.items():
                taken[name].append(self._seconds(run))
        return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def read_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that a plain sum reads from memory far larger than the caches; the best of several runs."""
    if device.type == "cuda":
        data = torch.randint(0, 2**30, ((size or 2**31) // 8,), device=device, dtype=torch.int64)
        timer = Timer({"read": data.sum}, device)
    else:
        data = torch.rand((size or 2**29) // 4)
        timer = Timer({"read": data.sum}, device)
    return data.nbytes / min(timer._seconds(timer.variants["read"]) for _ in range(7))


@dataclass(frozen=True)
class SpeedResult:
    """One decode step, dense against sparse, interleaved in one process. Times are medians."""

    context: int
    """Tokens in the cache."""
    batch: int
    runs: int
    dense_seconds: float
    """A step of the best dense variant, and which one it is."""
    dense_variant: str
    sparse_seconds: float
    sparse_variant: str
    gain: float
    dense_bytes: int
    """Bytes of weights and cache that a step has to read."""
    sparse_bytes: int
    allowed_gain: float
    """What the bytes allow: dense bytes over sparse bytes."""
    read_bandwidth: float
    """Bytes a second of a plain read, measured here."""
    kernel: str
    parity_error: float
    """Worst relative RMS difference of a sparse module's output from that of its reference."""
    variants: dict[str, float] = field(default_factory=dict)
    """Seconds a step of every variant that was timed."""
    int8_dense_seconds: float | None = None
    """A step of the best variant with the int8 weights and nothing skipped, where the plan has both."""
    int8_dense_bytes: int | None = None
    gain_over_int8_dense: float | None = None


@torch.inference_mode()
def benchmark(
    dense: nn.Module,
    sparse: nn.Module,
    ids_BT: Tensor,
    *,
    steps: int = 20,
    runs: int = 7,
    compile: bool = True,
    int8_dense: nn.Module | None = None,
) -> SpeedResult:
    """Times decode steps of both models after the same prompt, which should be real text: it decides what is skipped.

    Args:
        ids_BT: the prompt, and after its last `steps` tokens are taken off, what the steps are fed.
        runs: interleaved runs of `steps` steps; the median counts.
        compile: also time steps under `torch.compile`; the best variant of each model counts. The fused step of
            `sandcat.step` is a variant where it applies. On a GPU every step is captured in a CUDA graph.
        int8_dense: the model that has the int8 weights of the sparse one and skips nothing, as a second baseline.

    Raises:
        ParityError: a kernel's output is not that of its reference.
    """
    x_B1H = torch.empty(len(ids_BT), 1, 0, dtype=sparse.dtype, device=sparse.device)
    kernel = ", ".join(sorted({module.step_kernel(x_B1H) for module in kernel_modules(sparse).values()}))
    error = parity_error(sparse, ids_BT)
    modes = step_modes(sparse.device, compile)
    decoders: dict[str, Decoder] = {}
    models = {"dense": dense, "sparse": sparse} | ({} if int8_dense is None else {"int8-dense": int8_dense})
    for which, model in models.items():
        decoders |= prepared_steps(which, model, ids_BT, steps, modes, compile_fused=which != "sparse")
    medians = step_medians(decoders, ids_BT, steps, runs)
    best = {w: min((n for n in medians if n.startswith(w)), key=medians.__getitem__) for w in models}
    read = {which: step_bytes(model, ids_BT) for which, model in models.items()}
    int8 = medians[best["int8-dense"]] if int8_dense is not None else None
    return SpeedResult(
        ids_BT.shape[1] - steps, len(ids_BT), runs, medians[best["dense"]], best["dense"].split()[1],
        medians[best["sparse"]], best["sparse"].split()[1], medians[best["dense"]] / medians[best["sparse"]],
        read["dense"], read["sparse"], read["dense"] / read["sparse"], read_bandwidth(sparse.device), kernel, error,
        medians, int8, read.get("int8-dense"), None if int8 is None else int8 / medians[best["sparse"]],
    )  # fmt: skip


def step_modes(device: torch.device, compile: bool = True) -> dict[str, str | None]:
    """The variants of a step, and what `Decoder` calls them; the others are compared with the eager one, the first."""
    compiled = {"compiled": "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"} if compile else {}
    return {"eager": None, "fused": "fused"} | compiled


@torch.inference_mode()
def prepared_steps(
    which: str,
    model: nn.Module,
    ids_BT: Tensor,
    steps: int,
    modes: dict[str, str | None],
    *,
    compile_fused: bool = True,
) -> dict[str, Decoder]:
    """Decoders whose steps are compiled, captured and compared with the eager one: "dense eager", "dense fused", ...

    Args:
        which: what the model is called in their names.
        ids_BT, steps: see `benchmark`.
        modes: as `step_modes` gives them.
        compile_fused: compile, which takes minutes, also where the fused step applies.

    Raises:
        ParityError: a step is not the eager one.
    """
    prompt, first = ids_BT[:, :-steps], ids_BT[:, -steps:][:, :1].to(model.device)
    decoders: dict[str, Decoder] = {}
    skips = bool(sparse_modules(model))
    for mode, compiled in track(modes.items(), f"preparing {which} steps", total=len(modes)):
        if mode == "compiled" and not compile_fused and f"{which} fused" in decoders:
            continue
        decoder = Decoder(model, ids_BT.shape[1] + 1, batch=len(ids_BT), compile=compiled)
        decoder.prefill(prompt)
        logits = decoder.step(first).double()  # compiles
        if mode == "eager":
            eager = logits.clone()
        if error_of(logits, eager) > STEP_TOLERANCE[model.dtype] and (mode == "fused" or skips):
            check_by_layers(model, prompt, first, f"{which} {mode}", compiled)
        else:
            _check_step(f"{which} {mode}", logits, eager, model.dtype)
        if mode != "fused" or decoder.fused is not None:
            decoders[f"{which} {mode}"] = decoder
    return decoders


@torch.inference_mode()
def step_medians(decoders: dict[str, Decoder], ids_BT: Tensor, steps: int, runs: int) -> dict[str, float]:
    """Median seconds of a step of each, over interleaved runs; the first round left out. See `benchmark`."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in track(range(runs + 1), "timing steps"):
        for name, decoder in decoders.items():
            fed = ids_BT[:, -steps:].to(decoder.model.device)
            decoder.rewind(ids_BT.shape[1] - steps)
            _wait(fed.device)
            start = time.perf_counter()
            for i in range(steps):
                decoder.step(fed[:, i : i + 1])
            _wait(fed.device)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def error_of(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


def _check_step(name: str, logits: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """
    Raises:
        ParityError: a compiled or fused step is not the eager one by more than roundings can grow to.
    """
    error = error_of(logits, eager)
    if not error <= STEP_TOLERANCE[dtype]:
        raise ParityError(
            f"the {name} step differs from the eager one by {error:.1e} (relative RMS of the logits), and "
            f"{STEP_TOLERANCE[dtype]:.0e} is allowed. Nothing is timed. Please report model and machine."
        )


def check_by_layers(
    model: nn.Module, prompt: Tensor, ids_B1: Tensor, name: str, compile: str | None = "fused", *, at_once: int = 2
) -> None:
    """Compares fused or compiled steps with eager ones, of the model cut down to a few layers at a time.

    Where a rounding decides what is skipped, a deep model makes two right steps differ at will: random weights above
    all. Over a few layers they stay together, and a wrong step still does not. A compiler, which takes its time, is
    asked for the first few layers only.

    Raises:
        ParityError: they don't.
    """
    view = ModelView(model)
    for start in range(0, len(view.layers) if compile == "fused" else 1, at_once):
        with view.only(slice(start, start + at_once)):
            eager, other = (Decoder(model, prompt.shape[1] + 1, compile=mode) for mode in (None, compile))
            for decoder in (eager, other):
                decoder.prefill(prompt)
            want, found = eager.step(ids_B1).double(), other.step(ids_B1).double()
            _check_step(f"{name} (layers {start} to {start + at_once - 1} alone)", found, want, model.dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@torch.inference_mode()
def step_bytes(model: nn.Module, ids_BT: Tensor) -> int:
    """Bytes that one decode step after `ids_BT` reads: weights (what is skipped left out), thresholds, and the cache.

    A neuron counts if any sequence of the batch uses it. Embedding rows are too few to count.
    """
    read: dict[nn.Module, int] = {}
    modules = kernel_modules(model)
    handles = [
        module.register_forward_pre_hook(lambda m, args: read.__setitem__(m, m.bytes_read(args[0])))
        for module in modules.values()
    ]
    decoder = Decoder(model, ids_BT.shape[1])
    decoder.prefill(ids_BT[:, :-1])
    try:
        model(ids_BT[:, -1:].to(model.device), past_key_values=decoder.cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    inside = {p for module in read for p in module.parameters()}
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache.layers)
    return read_bytes(model) - sum(p.nbytes for p in inside) + sum(read.values()) + cache


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a dense step reads: the text decoder's, but of an embedding only if it is the head too."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    decoder = sum(p.nbytes for p in ModelView(model).decoder.parameters() if p is not table)
    return decoder + sum(p.nbytes for p in head.parameters())


def dense_bytes(model: nn.Module) -> int:
    """`read_bytes`, if its int8 weights were in the model's dtype."""
    scaled = [(module.weight, module.weight_scale) for module in model.modules() if scale_of(module) is not None]
    return read_bytes(model) + sum(w.numel() * (scale.itemsize - 1) - scale.nbytes for w, scale in scaled)


def bytes_share(sparse: nn.Module, dropped: dict[str, float]) -> float:
    """Bytes of weights, thresholds and factors that a step of one token reads, dense = 1, if so much is dropped."""
    modules = sparse_modules(sparse)
    inside = {p for module in modules.values() for p in module.parameters()}
    read = sum(modules[name].weight_bytes(1 - share) for name, share in dropped.items())
    return (read_bytes(sparse) - sum(p.nbytes for p in inside) + read) / dense_bytes(sparse)
