"""What importing sandcat must not do, and what it must have done all the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny import text, tiny, tokenizer

import sandcat


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_lean_import():
    """Importing sandcat loads neither torch nor transformers; using it no plotting, no tasks, no datasets, no GPU."""
    run("""
import sys
import sandcat
heavy = {"torch", "transformers", "numpy", "numba", "rich", "typer"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import torch
torch.cuda.init = torch.cuda._lazy_init = lambda *a: (_ for _ in ()).throw(RuntimeError("CUDA was touched"))
assert set(sandcat.__all__) == {name for name in sandcat.__all__ if getattr(sandcat, name)} == set(sandcat._HOMES)
heavy = {"matplotlib", "lm_eval", "datasets", "typer", "pandas"} & set(sys.modules)
assert not heavy, heavy
""")


def test_the_command_line_loads_no_torch_to_print_help():
    script = "import sys; from sandcat.cli import main; sys.argv = ['sandcat', '--help']\ntry: main()\nfinally: {}"
    assert "sparsify" in run(script.format("assert not {'torch', 'transformers'} & set(sys.modules)"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny("llama")
    sandcat.sparsify(model, None, "cats", calibration=text())
    return sandcat.save(model, tokenizer(), tmp_path_factory.mktemp("models") / "sparse")


ORDERS = [
    ("import sandcat", "from transformers import AutoModelForCausalLM"),
    ("from transformers import AutoModelForCausalLM", "import sandcat"),
    ("from transformers import AutoModelForCausalLM, LlamaForCausalLM", "import sandcat"),
    ("import sandcat", "from transformers import LlamaForCausalLM, AutoModelForCausalLM"),
    ("import sandcat", "import transformers.quantizers; from transformers import AutoModelForCausalLM"),
    ("import sandcat", "from transformers.quantizers.auto import AutoHfQuantizer as A, AutoHfQuantizer"),
    ("import sandcat, inspect; inspect.stack()", "from transformers.quantizers import AutoHfQuantizer"),
    ("import sandcat; sandcat.load", "from transformers import AutoModelForCausalLM"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_transformers_loads_sparse_models_whatever_was_imported_first(folder):
    """Each order in a process that has imported PyTorch, which takes long, and nothing else of these."""
    said = run(f"""
import os, sys
import torch, torch._dynamo, torch.distributed.tensor
assert not {{"sandcat", "transformers"}} & set(sys.modules)
for order in {ORDERS}:
    if not os.fork():
        for line in order:
            exec(line)
        from transformers import AutoModelForCausalLM
        print(order, type(AutoModelForCausalLM.from_pretrained({str(folder)!r}).model.layers[0].mlp).__name__)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, order
""")
    assert said.splitlines() == [f"{order} SparseMLP" for order in ORDERS]


def test_a_module_that_is_not_where_it_was_is_not_waited_for():
    run("""
import sys
from sandcat.support.lazy_import import register
register("json.somewhere.else", "wave")
assert "wave" in sys.modules and "json.somewhere.else" not in sys.modules
""")


def test_no_such_name():
    with pytest.raises(AttributeError, match="no attribute 'dogs'"):
        sandcat.dogs  # noqa: B018
    assert "sparsify" in dir(sandcat)
