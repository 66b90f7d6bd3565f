"""CPU kernel of a whole decode step: one call for all layers, on all threads, with barriers between its phases.

It runs records, each a function at an address with its operand (records.py, operations.py), that
`sandcat.decoding.fused_cpu` has written.
"""

from __future__ import annotations

from functools import cache

from numba import carray

from sandcat.ops.numba.primitives.amx import release_tiles
from sandcat.ops.numba.primitives.memory import pointer
from sandcat.ops.numba.primitives.processor import HAS_TILES
from sandcat.ops.numba.primitives.threads import VERSION, call, on_all_threads
from sandcat.ops.numba.step.records import OP


@cache
def kernel():
    """Runs a program, compiled on first use (and then cached on disk).

    Called with the addresses of a `MODEL` and of the first `OP`, how many there are, and the `VERSION`, and how many
    threads it may run on.
    """
    version = VERSION

    def body(args, thread, threads):
        if args[3] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        program = carray(pointer(args[1]), (args[2],), OP)
        for i in range(len(program)):
            call(program[i].function, (args[0], program[i].operand, thread, threads))
        if HAS_TILES:
            release_tiles()

    return on_all_threads(body)
