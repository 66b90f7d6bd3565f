"""What was written once is read for ever: folders with plans of format version 1, and a report of version 1.

The files in golden/ were written by the version that introduced these formats: tiny random models, with the logits that
they gave then. They are never written again; another version gets files of its own beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file

import sandcat
from sandcat.plans.plan import Plan
from sandcat.reports.report import Report

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.name for path in (GOLDEN / "plan-1").iterdir())


def lacks(old, new, path: str = "") -> list[str]:
    """What stood in the old JSON and is not in the new one as it was."""
    if isinstance(old, dict):
        assert isinstance(new, dict), path
        return [place for key in old for place in lacks(old[key], new.get(key), f"{path}.{key}")]
    if isinstance(old, list):
        assert isinstance(new, list) and len(old) == len(new), path
        return [place for i, item in enumerate(old) for place in lacks(item, new[i], f"{path}[{i}]")]
    return [] if old == new else [path]


def test_there_is_one_of_each_kind():
    assert FOLDERS == ["budget", "coreinfer", "int8", "int8-skipping", "rsparse", "skipping"]


@pytest.mark.parametrize("name", FOLDERS)
@torch.inference_mode()
def test_a_folder_gives_the_logits_that_it_gave(name):
    folder = GOLDEN / "plan-1" / name
    model, _ = sandcat.load(folder, device="cpu", require_plan=True)
    prompt = model(torch.arange(4, 20)[None], use_cache=True)
    step = model(torch.tensor([[7]]), past_key_values=prompt.past_key_values)
    assert_close(
        torch.cat([prompt.logits[0, -1:], step.logits[0]]),
        load_file(folder / "expected.safetensors")["logits"],
        torch.float32,
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_plan_says_what_it_said(name):
    written = json.loads((GOLDEN / "plan-1" / name / "config.json").read_text())["quantization_config"]
    plan = Plan.from_config(written)
    assert plan is not None
    assert lacks(written.get("sandcat", written), plan.to_json()) == []


def test_a_report_says_what_it_said():
    written = json.loads((GOLDEN / "report-1.json").read_text())
    report = Report.from_json(written)
    assert lacks(written, report.to_json()) == []
    assert "| 281.5 | 279.4 |" in report.markdown() and "<svg" in report.html()
