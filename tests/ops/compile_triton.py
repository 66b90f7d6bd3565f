"""Compiles the Triton kernels for a GPU that need not be here, and prints the registers of each, and the bytes of stack
that its threads take, which is what they spill.

python tests/ops/compile_triton.py [format of weights, default all] [compute capability, default 90]
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import teal_published
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

import sandcat.ops.triton.sparse_linear as linear
import sandcat.ops.triton.sparse_linear_batch as several
import sandcat.ops.triton.sparse_mlp as kernels
import sandcat.ops.triton.sparse_mlp_batch as tokens
import sandcat.ops.triton.step as step
import sandcat.ops.triton.stored_linear as stored
from sandcat.ops.triton.primitives.arguments import Heads, Lists, Neurons, Source, Zeros
from sandcat.ops.triton.primitives.launch import code_of
from sandcat.ops.triton.primitives.pages import Cached, New, Room, Turn

stored.multiprocessors = lambda device: 132
stored.shared_memory = lambda device: 231424

NONE = "constexpr"
"""The type of what is None."""
TYPES = {
    "x": "*{0}", "gate": "*{0}", "up": "*{0}", "down": "*{0}", "bias": "*{0}", "threshold": "*{0}", "h_nT": "*{0}",
    "count": "*i32", "list_n": "*i32", "keep_n": "*i32", "a_n": "*fp32", "a_nT": "*fp32", "y": "*fp32",
    "I": "i32", "H": "i32", "T": "i32", "N": "i32", "K": "i32", "L": "i32", "G": "i32", "D": "i32", "P": "i32",
    "WINDOW": "i32", "PIECES": "i32", "h": "*fp32", "w": "*{0}", "gate_bias": "*{0}", "up_bias": "*{0}", "q": "*{0}",
    "a": "*{0}",
    "position": "*i32", "keys": "*{0}", "values": "*{0}", "scale": "fp32", "out": "*{0}", "norm": "*{0}",
    "x_normed": "*{0}", "x_taken": "*{0}", "eps": "fp32", "parts": "*fp32", "gate_scale": "*{0}", "up_scale": "*{0}",
    "down_scale": "*{0}", "room": "*i32", "x_stride": "i32", "y_stride": "i32", "q_row": "i32", "back_t": "*fp32",
    "x_tn": "*{0}", "gate_stride": "i32", "up_stride": "i32", "due": "*{0}",
    "source": Source("*{0}", "*{0}", "*{0}", "fp32"), "zeros": Zeros("*fp32", "i32"),
    "neurons": Neurons("*{0}", "*i32", "*fp32", "*i32"), "heads": Heads("*fp32", "*fp32", "i32"),
    "lists": Lists("*i32", "*fp32", "*fp32", "*i32"), "new": New("*{0}", "*{0}", "i32", "i32"),
    "turn": Turn("*i32", "*{0}", "*{0}", "*{0}", "*{0}", "fp32"), "sizes": ("i32",) * 3,
    **dict.fromkeys(["weights", "thresholds", "biases", "scales"], ("*{0}",) * 3),
}  # fmt: skip
"""Of each argument, of a tuple's each."""
SIZES = (
    "I", "H", "N", "K", "L", "D", "x_stride", "y_stride", "gate_stride", "up_stride", "room", "sizes", "q_row",
    "new.k_row", "new.v_row", "heads.size",
    *(f"cached.{name}" for name in Cached._fields if name.startswith(("key_", "value_"))),
)  # fmt: skip
"""Sizes that a launch finds to be multiples of 16, as all addresses are; it makes loads wide."""
TL_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CODES = {"int8": "*i8", "fp8": "*fp8e4nv"}
DIGITS = {"int8": "*i8", "fp8": "*fp16"}
WEIGHTS = {
    kernels.gate_kernel: ["gate"], kernels.up_down_kernel: ["up", "down"], stored.coded_rows: ["weights"],
    linear.sparse_rows: ["weights"], several.listed_rows: ["weights"], tokens.up_tokens: ["up"],
    tokens.down_tokens: ["down"],
}  # fmt: skip
SCALES = {
    kernels.gate_kernel: ["gate_scale"], kernels.up_down_kernel: ["up_scale", "down_scale"],
    stored.coded_rows: ["scales"], linear.sparse_rows: ["scales"], several.listed_rows: ["scales"],
    tokens.up_tokens: ["scale"], tokens.down_tokens: ["scale"],
}  # fmt: skip


def resources(source: ASTSource, capability: int, options: dict) -> tuple[int, int]:
    """Registers and bytes of stack that a thread of a compiled kernel takes; what it spills goes to the stack."""
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))
    return registers, stack


def pairwise(*axes: Iterable) -> list[tuple]:
    """Few combinations of values, one of each axis, in which each two values of two axes meet."""

    def meet(case: tuple) -> set:
        return {(i, j, case[i], case[j]) for i, j in combinations(range(len(case)), 2)}

    cases, chosen = list(product(*axes)), []
    missing = set().union(*map(meet, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(meet(case) & missing)))
        missing -= meet(chosen[-1])
    return chosen


def source_of(kernel, types: dict, constants: dict) -> ASTSource:
    """A kernel for arguments of these types; what `constants` has is given. Parts of a named tuple are called after it
    and themselves, those of a plain one as it is, together."""
    signature, given, aligned = {}, {}, []
    for i, name in enumerate(kernel.arg_names):
        kind, found = types.get(name, NONE), []
        fields = getattr(kind, "_fields", None)
        whole = not isinstance(kind, tuple) or (fields and name in constants)
        for j, one in enumerate([NONE] if whole and fields else [kind] if whole else kind):
            at, part = ((i,), name) if whole else ((i, j), f"{name}.{fields[j]}" if fields else name)
            if one == NONE or part in constants:
                one, given[at] = NONE, constants.get(part)
            elif one[0] == "*" or part in SIZES:
                aligned.append(at)
            found.append(one)
        signature[name] = found[0] if whole else type(kind)(*found) if fields else tuple(found)
    return ASTSource(kernel, signature, given, {at: [["tt.divisibility", 16]] for at in aligned})


def of_dtype(kind, dtype: str):
    """A type of `TYPES`, or a tuple of them, for activations of that dtype."""
    if not isinstance(kind, tuple):
        return kind.format(dtype)
    parts = [one.format(dtype) for one in kind]
    return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)


def check(kernel, dtype: str, capability: int, *, format: str = "float", **constants) -> str:
    """The line of one kernel for one dtype."""
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
    warps = options["num_warps"]
    constants.pop("per_multiprocessor", None)
    if "PDL" in kernel.arg_names:
        constants["PDL"] = capability >= 90
    types = dict(TYPES)
    if kernel in (step.project, step.normalize, step.gate_times_up, step.gate_up, teal_published.masked_rows):
        types["y"] = "*{0}"
    if kernel is step.attend:
        types["room"] = Room("*fp32", "*fp32", "*fp32", "*i32")
    if kernel is stored.write_digits or (kernel is stored.coded_rows and "back_t" not in constants):
        types["room"] = DIGITS[format]
    if kernel in (several.list_channels, several.listed_rows):
        types["room"] = "i32"
    for name in ("FORMAT", "UP", "DOWN"):
        if name in kernel.arg_names:
            constants[name] = code_of(format)
    if format == "float":
        constants |= dict.fromkeys(SCALES.get(kernel, []))
    else:
        for name in WEIGHTS.get(kernel, []):
            types[name] = (CODES[format],) * 3 if isinstance(types[name], tuple) else CODES[format]
        types |= {name: "*{0}" for name in SCALES.get(kernel, []) if not isinstance(types[name], tuple)}
    types = {name: of_dtype(kind, dtype) for name, kind in types.items()}
    registers, stack = resources(source_of(kernel, types, constants), capability, options)
    shape = " ".join(
        f"{name.lower()} {constants[name]}" for name in ("TOKENS", "ROWS", "NEURONS", "BLOCK") if name in constants
    )
    types = dtype if format == "float" else f"{dtype} and {format}"
    return f"{kernel.fn.__name__:14} {types} {shape} {warps} warps: {registers} registers, stack {stack}"


def main(formats: tuple[str, ...], capability: int) -> None:
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for format in formats:
            if format != "float" and dtype == "fp16":
                continue  # as bf16
            size = itemsize if format == "float" else 1
            for kernel, constants in of_one_token(size, dtype, format):
                print(check(kernel, dtype, capability, format=format, **constants))
            if dtype == "bf16":  # fp16 is alike, and in fp32 several tokens run dense
                for kernel, constants in of_tokens(size, itemsize, dtype, format):
                    print(check(kernel, dtype, capability, format=format, **constants))
        if "float" not in formats:
            continue  # what follows has no weights
        for norms, crowded in product((dict.fromkeys(["turn.q_norm", "turn.k_norm"]), {}), (False, True)):
            config = step.attend_config(1, 128, itemsize, 521, 4, crowded)
            print(check(step.attend, dtype, capability, **norms, **config))
    if "float" not in formats:
        return
    for config in teal_published.CONFIGS:
        constants = config.kwargs | {"num_warps": config.num_warps}
        print(check(teal_published.masked_rows, "bf16", capability, **constants))
    print(check(kernels.in_order, "fp32", capability, BLOCK=8192, num_warps=32))
    print(check(kernels.add_parts, "fp32", capability, ROWS=32, BLOCK=64, num_warps=4))


def of_one_token(itemsize: int, dtype: str, format: str) -> Iterator[tuple]:
    """Kernels that read weights of so many bytes each, and their constants."""
    yield kernels.gate_kernel, {"CODE": 0, **kernels.gate_config(itemsize)}
    for hidden in (576, 2048, 4096, 8192):
        for parts in (False, True):
            yield kernels.up_down_kernel, {"PARTS": parts, **kernels.up_down_config(hidden, itemsize)}
    dtypes = {"CODE": 0, "DTYPE": getattr(tl, TL_TYPES[dtype])}
    if itemsize == 1:
        sizes, inputs, biases = ((4096,), (14336, 14336)), ("source.norm", "source.gate"), ((), ("biases",))
        for columns, rows, other, none in pairwise((4096, 8192, 14336), sizes, inputs, biases):
            config, _ = stored.coded_rows_config(format, list(rows), columns, torch.device("cuda"), columns)
            left_out = dict.fromkeys(["position", "back_t", other, *none])
            yield stored.coded_rows, {**left_out, **dtypes, "ADD": True, "SHARED": True, "ZEROS": 64, **config}
    else:
        for columns in (4096, 8192, 14336):
            config = step.whole_rows_config(columns, itemsize)
            yield step.project, {"position": None, **config}
            yield step.project, {"position": None, "biases": None, **config}
            yield step.normalize, {"ZEROS": 64, "position": None, **step.normalize_config(columns)}
            yield step.add_rows, {"gate": None, "ZEROS": 64, **dtypes, **config}
        yield step.gate_times_up, {"CODE": 0, "BLOCK": 1024, "num_warps": 4}
        yield step.gate_up, {"CODE": 0, **step.whole_rows_config(4096, itemsize, matrices=2)}
    constants = dict.fromkeys([*(f"neurons.{name}" for name in Neurons._fields), "position", "source.gate", "biases"])
    constants |= {"CODE": 0, "ADD": True, "HEAD_PARTS": 0, "ZEROS": 64}
    shapes = (((4096,) * 3, 4096), ((4096,), 11008), ((14336,) * 2, 4096), ((32000,), 4096))
    for (columns, channels), ordered, alone in pairwise(shapes, (False, True), (False, True)):
        config, _ = linear.sparse_rows_config(list(columns), channels, itemsize, 132, alone=alone)
        yield linear.sparse_rows, {**constants, "ORDERED": ordered, **config}
    config, _ = linear.sparse_rows_config([4096], 4096, itemsize, 132)
    constants |= {"ORDERED": False, "HEAD_PARTS": 4, "source.norm": None, "x_taken": None}
    yield linear.sparse_rows, {**constants, **config}


def of_tokens(itemsize: int, of_x: int, dtype: str, format: str) -> Iterator[tuple]:
    """Kernels of several tokens that read weights of so many bytes each, and their constants."""
    dtypes = {"CODE": 0, "DTYPE": getattr(tl, TL_TYPES[dtype])}
    for sizes, columns in (([4096] * 3, 4096), ([4096], 14336)):
        if itemsize == 1:
            for size in (4, 16):
                config, _ = stored.coded_rows_config(format, sizes, columns, torch.device("cuda"), columns, size)
                left_out = dict.fromkeys(["source", "position", "biases"]) | dtypes
                yield stored.coded_rows, {**left_out, "ADD": True, "SHARED": True, "ZEROS": 64, **config}
            for options in ({}, {"gate": None}):
                config = stored.write_digits_config(format, columns)
                yield stored.write_digits, {**dtypes, **options, "ZEROS": 64, **config}
        config, _ = several.listed_rows_config(sizes, columns, of_x, 132)
        yield several.listed_rows, {"biases": None, **config}
        config = several.list_channels_config(config["CHANNELS"], 16)
        yield several.list_channels, {"CODE": 0, "SHARED": True, "ZEROS": 64, **config}
    yield tokens.up_tokens, tokens.up_tokens_config(of_x)
    yield tokens.down_tokens, tokens.down_tokens_config(4096, of_x, 132)[0]
    for shared in (False, True):
        yield tokens.list_neurons, {"SHARED": shared, **tokens.list_neurons_config(16)}


if __name__ == "__main__":
    _, *given = sys.argv
    formats = tuple(word for word in given if not word.isdecimal()) or ("float", *CODES)
    main(formats, next((int(word) for word in given if word.isdecimal()), 90))
