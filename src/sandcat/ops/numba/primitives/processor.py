"""What kernels choose by: how the processor reads rows, and which of its instructions multiply them.

It is the processor that Numba compiles for: this one, or what the variables NUMBA_CPU_NAME and NUMBA_CPU_FEATURES make
of it, so that every path can be taken on a processor that would choose another (tests/ops/paths.py).
"""

from __future__ import annotations

import ctypes
import platform
import sys

from numba.core.registry import cpu_target


def _compiled_for() -> tuple[str, frozenset[str]]:
    """LLVM's name of the processor, and the features that Numba says it has, beside those that the name implies."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name, frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))


def tiles_permitted() -> bool:
    """Whether Linux lets this process use the matrix unit."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


NAME, FEATURES = _compiled_for()
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
ONE_BY_ONE = NAME.startswith("znver")
"""Whether rows are read one after another, as AMD's processors read ahead of those by themselves, and faster than of
four at once or than what is asked for (docs/performance.md)."""
SHORT_ROW = 2048 if ONE_BY_ONE else 0
"""Bytes of rows that are not worth skipping: it breaks the reading ahead, which costs about half as many."""
HAS_FOURS = "avx512vnni" in FEATURES
"""Whether one instruction multiplies and adds four int8 numbers (int8_vnni.py)."""
HAS_PAIRS = "avx512bf16" in FEATURES
"""Whether one multiplies and adds two bfloat16 numbers (bfloat16_pairs.py)."""
HAS_TILES = "amx-bf16" in FEATURES and tiles_permitted()
"""Whether there is a unit that multiplies tiles of bfloat16 numbers (amx.py)."""
HAS_HALF = "f16c" in FEATURES or IS_ARM
"""Whether an instruction widens and narrows float16 (float16.py)."""


def path() -> str:
    """The path that kernels take here, in words: registers, the order of rows, and what multiplies them."""
    registers = {"avx512f": "AVX-512", "avx2": "AVX2"}
    wide = next((text for feature, text in registers.items() if feature in FEATURES), "NEON" if IS_ARM else "no SIMD")
    words = [wide, "rows one by one" if ONE_BY_ONE else "rows four at once"]
    words += ["int8 by VNNI"] * (ONE_BY_ONE and HAS_FOURS) + ["bfloat16 by pairs"] * (ONE_BY_ONE and HAS_PAIRS)
    return ", ".join(words + ["bfloat16 by AMX"] * HAS_TILES)
