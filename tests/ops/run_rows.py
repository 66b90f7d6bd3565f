"""Products and sums of rows on one path (paths.py), against float64; `test_paths.py` runs it with the variables that
lead there. It prints the path that was taken."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import paths

name = sys.argv[1]
paths.take(name)

import test_dtypes
import test_rows
import test_tiles
import torch

from sandcat.ops.numba.primitives import processor

if paths.can_run(paths.PATHS[name]):
    assert processor.path() == name, processor.path()
stored = paths.PATHS[name].stored
for tokens in test_rows.TOKENS:
    if processor.HAS_TILES:
        test_tiles.test_equals_torch(test_tiles.by_tiles, getattr(torch, stored), tokens)
    else:
        test_rows.check(tokens, stored, True, all_rows=False)
        test_rows.check(tokens, stored, False, all_rows=False)
if stored == "float16":
    test_dtypes.test_float16_and_back()
    test_dtypes.test_e4m3()
print(name)
