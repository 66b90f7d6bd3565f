"""The paths that kernels take on processors, and how to take them here: Numba is told that it compiles for another one.

`python tests/ops/paths.py` lists them, and `python tests/ops/paths.py "AVX2, rows one by one" tests/decoding` runs
pytest with all kernels on one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from typing import NamedTuple

import pytest
from llvmlite import binding

from sandcat.ops.numba.primitives.processor import tiles_permitted


class Forced(NamedTuple):
    """A processor that takes a path: its name in LLVM, the features that the path needs, and the beginnings of names of
    those that it does without."""

    cpu: str
    needs: tuple[str, ...]
    lacks: tuple[str, ...]
    stand_in: str | None = None
    """Of `stand_ins.py`, where this processor lacks the instructions."""
    stored: str = "int8"
    """Rows of which the path has products of its own, or which it widens in its own way."""


_BEFORE_AVX512 = ("amx", "avx10", "avx512")
PATHS = {
    "AVX-512, rows four at once, bfloat16 by AMX": Forced("sapphirerapids", ("avx512f", "amx-bf16"), (), "tiles"),
    "AVX-512, rows one by one, int8 by VNNI, bfloat16 by pairs": Forced(
        "znver4", ("avx512vnni", "avx512bf16"), ("amx",), "pairs", "bfloat16"
    ),
    "AVX-512, rows one by one, int8 by VNNI": Forced("znver4", ("avx512vnni",), ("amx", "avx512bf16"), "fours"),
    "AVX-512, rows four at once": Forced("skylake-avx512", ("avx512f",), ("amx", "avx512bf16", "avx512vnni")),
    "AVX2, rows four at once": Forced("haswell", ("avx2", "fma"), _BEFORE_AVX512, None, "bfloat16"),
    "AVX2, rows one by one": Forced("znver3", ("avx2", "fma"), _BEFORE_AVX512),
    "no SIMD, rows four at once": Forced("x86-64", (), ("",), None, "float16"),
}
"""By how `processor.path` names them; "no SIMD" is what x86-64 had at first, 16 bytes wide. NEON runs on Arm alone."""


def can_run(path: Forced) -> bool:
    """Whether this processor has the instructions."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    has = binding.get_host_cpu_features()
    return all(has.get(feature) for feature in path.needs) and ("amx-bf16" not in path.needs or tiles_permitted())


def environment(path: Forced) -> dict[str, str]:
    """The variables with which Python takes a path that this processor can run."""
    features = binding.get_host_cpu_features()
    kept = {name: has and not name.startswith(path.lacks) for name, has in features.items()}
    said = "" if path.lacks == ("",) else ",".join(f"{'+' if has else '-'}{name}" for name, has in kept.items())
    return os.environ | {"NUMBA_CPU_NAME": path.cpu, "NUMBA_CPU_FEATURES": said}


def take(name: str) -> None:
    """In a process that has not imported kernels: lets stand-ins do what this processor cannot."""
    if not can_run(PATHS[name]):
        import stand_ins

        stand_ins.install(PATHS[name].stand_in)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs pytest with all CPU kernels on one path, or lists the paths.")
    parser.add_argument("path", nargs="?", choices=list(PATHS), metavar="PATH")
    parser.add_argument("tests", nargs="*", help="what pytest gets")
    given = parser.parse_args()
    if not given.path:
        for name, path in PATHS.items():
            print("yes        " if can_run(path) else "stand-ins  " if path.stand_in else "no         ", name)
    elif can_run(PATHS[given.path]):
        command = [sys.executable, "-m", "pytest", *given.tests]
        os.execve(sys.executable, command, environment(PATHS[given.path]))
    elif not PATHS[given.path].stand_in:
        sys.exit(f"{given.path}: this processor cannot run it.")
    else:
        with tempfile.TemporaryDirectory() as folder:  # what is compiled is of no use to others
            os.environ["NUMBA_CACHE_DIR"] = folder
            take(given.path)
            sys.exit(pytest.main(given.tests))


if __name__ == "__main__":
    main()
