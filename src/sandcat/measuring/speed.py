"""Speed: seconds and bytes a token, dense beside sparse, interleaved. What fails its parity check is not timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sandcat.decoding.decoder import Decoder
from sandcat.layers.op_module import kernel_modules
from sandcat.measuring.bytes_read import step_bytes
from sandcat.measuring.parity import parity_error
from sandcat.measuring.step_parity import check_step
from sandcat.models.rotary import grows
from sandcat.support.progress import track


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
    stored_dense_seconds: float | None = None
    """A step of the best variant with the weights as they are stored and nothing skipped, where the plan has both."""
    stored_dense_bytes: int | None = None
    gain_over_stored_dense: float | None = None


@torch.inference_mode()
def benchmark(
    dense: nn.Module,
    sparse: nn.Module,
    ids_BT: Tensor,
    *,
    steps: int = 20,
    runs: int = 7,
    compile: bool = True,
    stored_dense: nn.Module | None = None,
) -> SpeedResult:
    """Times decode steps of both models after the same prompt, which should be real text: it decides what is skipped.

    Args:
        ids_BT: the prompt, and after its last `steps` tokens are taken off, what the steps are fed.
        runs: interleaved runs of `steps` steps; the median counts.
        compile: also time steps under `torch.compile`, where one program can be every step (`models.rotary.grows`); the
            best variant of each model counts. The fused step of `sandcat.decoding.step` is a variant where it applies.
            On a GPU every step is captured in a CUDA graph, where it can be.
        stored_dense: the model that has the weights of the sparse one as they are stored and skips nothing, as a second
            baseline.

    Raises:
        ParityError: a kernel's output is not that of its reference.
    """
    x_B1H = torch.empty(len(ids_BT), 1, 0, dtype=sparse.dtype, device=sparse.device)
    kernel = ", ".join(sorted({module.step_kernel(x_B1H) for module in kernel_modules(sparse).values()}))
    error = parity_error(sparse, ids_BT)
    modes = step_modes(sparse.device, compile and not grows(sparse.config))
    decoders: dict[str, Decoder] = {}
    models = {"dense": dense, "sparse": sparse} | ({} if stored_dense is None else {"stored-dense": stored_dense})
    for which, model in models.items():
        decoders |= prepared_steps(which, model, ids_BT, steps, modes, compile_fused=which != "sparse")
    medians = step_medians(decoders, ids_BT, steps, runs)
    best = {w: min((n for n in medians if n.startswith(w)), key=medians.__getitem__) for w in models}
    read = {which: step_bytes(model, ids_BT) for which, model in models.items()}
    stored = medians[best["stored-dense"]] if stored_dense is not None else None
    return SpeedResult(
        ids_BT.shape[1] - steps, len(ids_BT), runs, medians[best["dense"]], best["dense"].split()[1],
        medians[best["sparse"]], best["sparse"].split()[1], medians[best["dense"]] / medians[best["sparse"]],
        read["dense"], read["sparse"], read["dense"] / read["sparse"], read_bandwidth(sparse.device), kernel, error,
        medians, stored, read.get("stored-dense"), None if stored is None else stored / medians[best["sparse"]],
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
    for mode, compiled in track(modes.items(), f"preparing {which} steps", total=len(modes)):
        if mode == "compiled" and not compile_fused and f"{which} fused" in decoders:
            continue
        decoder = Decoder(model, ids_BT.shape[1] + 1, batch=len(ids_BT), compile=compiled)
        decoder.prefill(prompt)
        logits = decoder.step(first).double()  # compiles
        if mode == "eager":
            eager = logits.clone()
        if mode == "fused" and decoder.fused is None:
            continue
        check_step(f"{which} {mode}", model, prompt, first, compiled, logits, eager)
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
