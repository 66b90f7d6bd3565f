"""The house: imports run one way, from a room to those below it, and what users import stays where it is."""

from __future__ import annotations

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandcat

ROOT = Path(sandcat.__file__).parent
ROOMS = [  # from the top of the house to the ground
    "__main__", "cli", "sweeps", "pipeline", "reports", "calibration", "tasks", "evaluate", "measuring",
    "lm_eval_model", "generate", "checkpoints", "serving", "plans", "methods", "adapters", "rounding", "method",
    "decoding", "layers", "data", "processes", "quantile", "models", "ops", "support", "version", "errors", "defaults",
]  # fmt: skip
"""What stands on nothing but what is below it. `sandcat` itself only names what others hold."""
PUBLIC = {
    "adapters": ["follow_masks", "merge"],
    "data": ["Text", "load_text"],
    "errors": ["SandcatError"],
    "evaluate": ["evaluate_text"],
    "generate": ["Decoder", "encode", "generate", "sample"],
    "layers.modes": ["every_token_sparse", "prompt_of"],
    "lm_eval_model": [],
    "method": ["Method", "Spec", "Tensors", "option"],
    "methods": ["METHODS", "Cats", "Coreinfer", "Int8", "Relufy", "Rsparse", "Teal"],
    "processes": ["together"],
    "tasks": ["run_tasks"],
}
"""Modules and names that README and docs tell users to import."""


def imports() -> Iterator[tuple[str, str]]:
    """(module, module that it imports), within sandcat, wherever in a file the import stands."""
    modules = {
        ".".join(("sandcat", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in ROOT.rglob("*.py")
    }
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sandcat":
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    yield module, whole if whole in modules else node.module
            elif isinstance(node, ast.Import):
                yield from ((module, name.name) for name in node.names if name.name in modules)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_file_has_its_room():
    assert {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        *ROOMS, "__init__",
    }  # fmt: skip


def test_imports_run_down():
    floor = {name: number for number, name in enumerate(ROOMS)}
    up = {
        f"{module} imports {other}"
        for module, other in imports()
        if "sandcat" not in (module, other) and floor[room(module)] > floor[room(other)]
    }
    assert not up, up


def test_no_modules_import_each_other():
    graph: dict[str, set[str]] = {}
    for module, other in imports():
        if module != other and "sandcat" not in (module, other):
            graph.setdefault(module, set()).add(other)
    graphlib.TopologicalSorter(graph).prepare()  # a circle is an error that names it


@pytest.mark.parametrize("module", [name for name in PUBLIC if name != "lm_eval_model"])
def test_public_names_stay(module):
    found = importlib.import_module(f"sandcat.{module}")
    assert [name for name in PUBLIC[module] if not hasattr(found, name)] == []


def test_the_names_of_the_package_stay():
    assert set(sandcat.__all__) >= {
        "METHODS", "Method", "Plan", "SandcatError", "load", "parse", "save", "sparsify", "sweep",
    }  # fmt: skip
    assert importlib.util.find_spec("sandcat.lm_eval_model")  # python -m sandcat.lm_eval_model


def undocumented(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public definitions of a module without a docstring, but for methods that a base class may have described."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from (f"{node.name}.{name}" for name in undocumented(node))


def test_public_definitions_say_what_they_are():
    found = {path: list(undocumented(ast.parse(path.read_text(encoding="utf-8")))) for path in ROOT.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == {}
