#!/usr/bin/env bash
# Triton 3.6.0: a kernel that takes a tuple of which a part is None cannot ask whether the tuple itself is None: it does
# not compile. It can ask the same of the part, and of the tuple where no part is None. (3.7.1 compiles all four.)
# A good guess: `x is not None` is True of any tuple, whatever its parts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check triton==3.6.0
cat > "$folder/kernels.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile


@triton.jit
def asks_the_part(out, pair):
    if pair[1] is not None:
        tl.store(out, 1)


@triton.jit
def asks_the_tuple(out, pair):
    if pair is not None:
        tl.store(out, 1)


def outcome(kernel, part):
    signature = {"out": "*i32", "pair": ("*i32", "constexpr" if part is None else part)}
    source = ASTSource(kernel, signature, {(1, 1): None} if part is None else {})
    try:
        compile(source, target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError as error:
        return str(error).strip().splitlines()[-1]
    return "compiles"


found = {}
for kernel in (asks_the_part, asks_the_tuple):
    for part in ("*i32", None):
        found[kernel.__name__, part] = outcome(kernel, part)
        print(f"{kernel.__name__}, which is {part}: {found[kernel.__name__, part]}")
failed = [which for which, said in found.items() if said != "compiles"]
assert failed == [("asks_the_tuple", None)] and "'NoneType'" in found[failed[0]], found
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/kernels.py"
# Seen:
# asks_the_part, which is *i32: compiles
# asks_the_part, which is None: compiles
# asks_the_tuple, which is *i32: compiles
# asks_the_tuple, which is None: AttributeError("'NoneType' object has no attribute 'type'")
