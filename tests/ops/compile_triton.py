"""Compiles the Triton kernels for a GPU that need not be here, and prints registers and spilled bytes of each.

python tests/ops/compile_triton.py [compute capability, default 90]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

import sandcat.ops.triton.sparse_linear as linear
import sandcat.ops.triton.sparse_mlp as kernels
import sandcat.ops.triton.step as step

TYPES = {
    "x": "*{0}", "gate": "*{0}", "up": "*{0}", "down": "*{0}", "bias": "*{0}", "threshold": "*{0}", "h_nT": "*{0}",
    "count": "*i32", "list_n": "*i32", "keep_n": "*i32", "a_n": "*fp32", "a_nT": "*fp32", "y": "*fp32",
    "I": "i32", "H": "i32", "T": "i32", "N": "i32", "K": "i32", "A": "i32", "B": "i32", "C": "i32", "L": "i32",
    "G": "i32", "D": "i32", "WINDOW": "i32", "ids": "*i64", "table": "*{0}", "h": "*fp32", "a": "*{0}", "b": "*{0}",
    "c": "*{0}", "a_bias": "*{0}", "b_bias": "*{0}", "c_bias": "*{0}", "w": "*{0}", "gate_bias": "*{0}",
    "up_bias": "*{0}", "q": "*{0}", "k": "*{0}", "v": "*{0}", "q_norm": "*{0}", "k_norm": "*{0}", "cos": "*{0}",
    "sin": "*{0}", "position": "*i32", "keys": "*{0}", "values": "*{0}", "scale": "fp32", "top_ws": "*fp32",
    "sum_ws": "*fp32", "acc_ws": "*fp32", "arrived": "*i32", "out": "*{0}", "norm": "*{0}", "x_normed": "*{0}",
    "eps": "fp32", "squares": "*fp32", "n_squares": "i32", "a_threshold": "*{0}", "b_threshold": "*{0}",
    "c_threshold": "*{0}", "list_i": "*i32", "list_x": "*fp32", "parts": "*fp32", "neurons": "*{0}",
    "a_scale": "*fp32", "b_scale": "*fp32", "c_scale": "*fp32", "gate_scale": "*fp32", "up_scale": "*fp32",
}  # fmt: skip


def check(kernel, dtype: str, capability: int, **constants) -> str:
    """Registers a thread and bytes spilled, of one kernel for one dtype."""
    warps = constants.pop("num_warps")
    constants.pop("per_multiprocessor", None)
    if "PDL" in kernel.arg_names:
        constants["PDL"] = capability >= 90
    weights = constants.pop("weights", dtype)
    types = TYPES | ({"y": "*{0}"} if kernel in (step.project, step.gate_up, linear.sparse_rows) else {})
    if kernel is linear.sparse_rows:
        types |= {name: f"*{weights}" for name in "abc"}
    types = {name: type for name, type in types.items() if name not in constants}
    signature = {name: types[name].format(dtype) if name in types else "constexpr" for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(built.asm["ptx"].encode())
        file.flush()
        arch = f"sm_{capability}{'a' if capability == 90 else ''}"
        said = subprocess.run(
            [ptxas, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    registers = next(w for line in said.splitlines() if "Used" in line for w in [line.split("Used ")[1].split()[0]])
    spilled = [line.strip().split(",")[1].strip() for line in said.splitlines() if "spill stores" in line]
    shape = " ".join(
        f"{name.lower()} {constants[name]}" for name in ("TOKENS", "ROWS", "NEURONS", "BLOCK") if name in constants
    )
    return f"{kernel.fn.__name__:14} {dtype} {shape} {warps} warps: {registers} registers, {spilled[-1]}"


def main(capability: int) -> None:
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for hidden in (576, 2048, 4096, 8192):
            print(check(kernels.gate_kernel, dtype, capability, CODE=0, **kernels.gate_config(hidden, itemsize)))
            print(check(kernels.up_down_kernel, dtype, capability, **kernels.up_down_config(hidden, itemsize)))
        for kernel, config in zip(
            (kernels._gate_tokens, kernels._up_tokens, kernels._down_tokens),
            (kernels.rows_config(itemsize), kernels.rows_config(itemsize), kernels.columns_config(itemsize)),
            strict=True,
        ):
            extra = {"CODE": 2} if kernel is kernels._gate_tokens else {}
            extra |= {"SPLITS": 16} if kernel is kernels._down_tokens else {}
            print(check(kernel, dtype, capability, **config, **extra))
        for hidden in (4096, 8192):
            none = dict.fromkeys(["a_bias", "b_bias", "c_bias", "a_scale", "b_scale", "c_scale", "position"])
            print(check(step.project, dtype, capability, **step.whole_rows_config(hidden, itemsize)))
            print(check(step.project, dtype, capability, **none, **step.whole_rows_config(hidden, itemsize)))
        for hidden in (4096, 14336):
            print(
                check(
                    step.add_rows,
                    dtype,
                    capability,
                    CODE=0,
                    gate=None,
                    scale=None,
                    **step.whole_rows_config(hidden, itemsize),
                )
            )
        print(
            check(
                step.gate_up,
                dtype,
                capability,
                CODE=0,
                gate_scale=None,
                up_scale=None,
                **step.whole_rows_config(4096, itemsize, matrices=2),
            )
        )
        none = dict.fromkeys(["a_scale", "b_scale", "c_scale", "a_bias", "b_bias", "c_bias", "gate", "neurons"])
        for columns, channels in (([4096] * 3, 4096), ([4096], 11008), ([14336] * 2, 4096)):
            config, _ = linear.sparse_rows_config(columns, channels, itemsize, 132)
            extra = {"h": None, "CODE": 0}
            print(check(linear.sparse_rows, dtype, capability, **none, **extra, **config))
            config, _ = linear.sparse_rows_config(columns, channels, 1, 132)
            extra |= {"weights": "i8", "h": None}
            print(check(linear.sparse_rows, dtype, capability, **dict.fromkeys(["gate", "neurons"]), **extra, **config))
        none = dict.fromkeys(["q_norm", "k_norm"])
        print(check(step.attend, dtype, capability, **none, **step.attend_config(1, 128, itemsize, 521, 4)))
        print(check(step.attend, dtype, capability, **step.attend_config(1, 128, itemsize, 521, 4)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
