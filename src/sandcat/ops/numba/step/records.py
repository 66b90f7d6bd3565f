"""The records of a decode step on a CPU, which `sandcat.decoding.cpu_parts` writes and operations.py runs.

Shapes: B sequences in R rows (see linears.py), H hidden size, I intermediate size, D size of a head, L tokens of a
sequence, at most.
"""

from __future__ import annotations

from sandcat.ops.numba.paged_attention import JOB
from sandcat.ops.numba.primitives import matrices
from sandcat.ops.numba.primitives.memory import record

OP = record("function operand")
"""A record of the program: the address of what it does (operations.py), and that of its operand, which is one of those
below."""
X, HIDDEN, BETWEEN = range(3)
"""What a record reads: its `source`. x is each thread's own, all else all threads share."""
LINEAR = record(f"{matrices.FIELDS} threshold by_inputs summed sums_at skips masks shared", "unit")
"""A matrix (see matrices.py), and what is kept of its inputs. Where it `skips`, which needs a weight stored by inputs,
those that are not above their threshold, or 0 if there is none, are not read; where it `masks`, they are read, and
count as 0. Several sequences use one list of them if `shared` (see ops/shared_units.py). `summed`: each thread adds up
its share of the inputs, see `is_summed`, in its sums from `sums_at` on."""
NORMED = record("weight", "eps")
PROJECTED = record("", **dict.fromkeys(("q", "k", "v"), LINEAR))
ATTENDED = record("q_norm k_norm", "head_eps", cached=JOB)
NEURONAL = record("activation skips masks shared neurons neuron_threshold", gate=LINEAR, up=LINEAR)
"""`skips`: neurons with |activation| <= neuron_threshold are skipped; `masks`: they are read, and count as 0; `shared`:
by one list for all sequences."""
ADD, LOGITS, REPLACE, ACCUMULATE, DROPPED = range(5)
"""Where a product goes, `into`. ADD: h += it. LOGITS: they are it. REPLACE: some columns of a target = it, ACCUMULATE:
+= it. DROPPED: between = it, with what another product drops of its source."""
PRODUCED = record("into source target row at threshold", linear=LINEAR)
"""A target is float32 [R, row], of which the columns from `at` on are meant; `threshold`: of what is DROPPED."""
GATING = record("gate up row activation neurons")
MOVED = record("source tensor size target row at")
"""A tensor [B, size] in the model's dtype."""
MODEL = record(
    "sequences rows tokens lengths table table_row table_column vocabulary cos sin h qkv partial hidden between "
    "logits scores outputs heads groups D H L x y kept wanted values sums pack room most stride tiles rank",
)
"""`tokens` [B]: the ids; `table_row`, `table_column`: how far rows and columns of the embedding table lie apart;
`groups`: key-value heads; `lengths` [B]: tokens cached, int32; `outputs`: logits; between [R, rank]. Of each thread: x,
y and values [R, most], kept and wanted [most], sums [R, stride] (see linears.py), room [tiles], where `most` is the
most units that a matrix has. `pack`: the function that lays out for the processor's matrix unit, or 0."""
