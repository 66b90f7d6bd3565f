"""Triton's interpreter, for programs that import this first: it is chosen as kernels are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

Launch, Nothing = interpreter.GridExecutor, interpreter._LangPatchScope
_prepare, _prepared = interpreter._patch_lang, set()


def _prepare_once(function) -> Nothing:
    """Triton prepares its language for each launch and each call of a kernel's function anew, which is half of all
    time; here it stays so, and there is nothing to restore."""
    if function not in _prepared:
        _prepared.add(function)
        _prepare(function)
    return Nothing()


interpreter._patch_lang = _prepare_once
# As on a GPU, where Triton looks for sums of integers that overflow only if asked.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
