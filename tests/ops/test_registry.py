"""What has kernels: a file that moves takes its row of the registry along."""

from __future__ import annotations

import importlib.util

from sandcat.ops import registry


def test_every_file_of_kernels_is_there():
    for library in ("numba", "triton"):
        for op, (_, file) in registry.OPS.items():
            found = importlib.util.find_spec(f"sandcat.ops.{library}.{file}")
            assert found is not None or (library, op) == ("triton", "core_mlp"), (library, op)
