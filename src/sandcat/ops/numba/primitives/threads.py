"""Runs a compiled kernel on all of PyTorch's CPU threads.

Two thread pools get in each other's way: idle OpenMP threads spin for a while before they sleep. So kernels run on the
pool that PyTorch has already (`GOMP_parallel` of the libgomp in its process), and where there is no libgomp, on Numba's
own.

A kernel is `body(args, thread, threads)`, which `numba.njit` can compile: `args` is an int64 array of `SLOTS` addresses
and sizes, and the body does its share, `thread` of `threads`.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from sandcat.ops.numba.primitives.memory import fill

SLOTS = 8
_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[2].rglob("*.py")))
VERSION = int.from_bytes(hashlib.sha256(_sources).digest()[:7])
"""A digest of the sources of all ops: Numba looks at a kernel's own file alone before it takes compiled code from its
cache, so every kernel has this built in."""


def _torch_openmp() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1")  # by now PyTorch's own, if it brought one
    except OSError:
        return None
    for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library


_openmp = _torch_openmp()
HAS_BARRIER = _openmp is not None
"""Whether a kernel may call `GOMP_barrier`, which waits for all threads."""
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def on_all_threads(body) -> Callable[[list[int], int], None]:
    """The kernel as a function of its list of addresses and sizes, and of how many threads it may run on.

    It returns when every thread is done, and may be called from several Python threads at once.
    """
    try:
        body = njit(cache=True)(body)
    except RuntimeError:  # no folder to keep compiled code in: compile in every process
        body = njit(body)
    if _openmp is None:
        lock = threading.Lock()  # of Numba's pools, the one that is always there may not be entered twice

        @njit(parallel=True, nogil=True)
        def spread(args, threads):
            for thread in prange(threads):
                body(args, thread, threads)

        def run(args: list[int], threads: int) -> None:
            with lock:
                numba.set_num_threads(threads)
                spread(np.array(args, dtype=np.int64), threads)

        return run

    body_at = _at_its_address(body)

    @cfunc(types.void(types.CPointer(types.int64)))
    def entry(args):
        body_at(carray(args, (SLOTS,)), _thread(), _threads())

    address = entry.address
    slots = ctypes.c_int64 * SLOTS

    def run(args: list[int], threads: int) -> None:
        filled = slots(*args)  # alive until the threads are done with it
        _openmp.GOMP_parallel(address, ctypes.addressof(filled), threads, 0)

    return run


def run_job(kernel: Callable[[list[int], int], None], kind: np.dtype, threads: int, **values: Any) -> None:
    """Runs a kernel of the address of a record and the `VERSION`; `values` of the record: see `memory.fill`."""
    job = np.zeros(1, kind)
    held = fill(job[0], **values)  # which is read by address
    kernel([job.ctypes.data, VERSION], threads)
    del held


def at_address(body) -> int:
    """The address of a function of integers that gives nothing, compiled for the rest of the process."""
    signature = types.void(*[types.int64] * body.__code__.co_argcount)
    try:
        compiled = cfunc(signature, cache=True)(body)
    except RuntimeError:  # as above
        compiled = cfunc(signature)(body)
    _functions.append(compiled)
    return compiled.address


_functions: list = []


@intrinsic
def call(typing, address, integers):
    """Calls a function of `at_address` with a tuple of integers."""

    def generate(context, builder, signature, args):
        given = cgutils.unpack_tuple(builder, args[1])
        given = [context.cast(builder, *both, types.int64) for both in zip(given, integers, strict=True)]
        kind = ir.FunctionType(ir.VoidType(), [number.type for number in given])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.none(types.int64, integers), generate


def _at_its_address(body):
    """The compiled body, to be called by its address: else what calls it would compile it again in every process."""
    signature = (types.Array(types.int64, 1, "C"), types.int32, types.int32)
    body.compile(signature)
    compiled = body.overloads[signature]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)

    @intrinsic
    def call(typing, args, thread, threads):
        def generate(context, builder, call_signature, values):
            kind = context.call_conv.get_function_type(types.none, signature)
            function = builder.inttoptr(ir.IntType(64)(address), kind.as_pointer())
            context.call_conv.call_function(builder, function, types.none, signature, values)
            return context.get_dummy_value()

        return types.none(*signature), generate

    return call


def threads_of() -> int:
    """How many threads a kernel runs on: PyTorch's setting, as far as Numba's own pool allows where that one runs."""
    threads = torch.get_num_threads()
    return threads if _openmp is not None else min(threads, numba.config.NUMBA_NUM_THREADS)
