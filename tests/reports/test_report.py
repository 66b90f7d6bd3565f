"""The report: what it says, that it says it honestly, and that its page needs nothing but itself."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from sandcat.errors import CheckpointError
from sandcat.measuring.machine import machine
from sandcat.measuring.quality import TextResult
from sandcat.measuring.sparsity import Histogram, LayerSparsity
from sandcat.measuring.speed import SpeedResult
from sandcat.measuring.tasks import TaskResult
from sandcat.reports.report import Report
from sandcat.reports.rows import CurvePoint, Sample

HOSTILE = '"><script src="https://evil.example/x.js"></script>| [bold]x[/bold] $\\alpha$ <img src=//evil.example>'
VARIANTS = {"dense eager": 0.012, "dense compiled": 0.01, "sparse eager": 0.008, "sparse compiled": 0.009}
FAST = SpeedResult(
    512, 1, 7, 0.01, "compiled", 0.008, "eager", 1.25, 200_000_000, 150_000_000, 4 / 3, 30e9, "numba", 1e-4, VARIANTS
)
SLOW = dataclasses.replace(FAST, sparse_seconds=0.0125, gain=0.8)
REFERENCE = dataclasses.replace(SLOW, kernel="reference")
EMPTY = Report(model={"name": "model"}, recipe="cats")


def full(speed: SpeedResult = FAST, name: str = "model") -> Report:
    """A report with something in every field."""
    site = "model.layers.0.mlp"
    edges = [-4 + i for i in range(7)]
    return Report(
        model={"name": name, "family": "llama", "parameters": 134_515_008, "dtype": "bfloat16", "layers": 2},
        recipe="cats:layers=[0,1]",
        plan={"methods": [{"name": "cats", "options": {"layers": [0, 1], "dense_prompt": True}}]},
        calibration={"source": name, "sha256": "ab" * 32, "tokens": 32_768, "sequential": True},
        text=[TextResult(name, "cd" * 32, 16_368, 1024, 0, 14.2, 15.0, 1.0563, 0.0042, 0.061, 0.001, 0.88, 0.003)],
        tasks=[
            TaskResult(name, "acc", 100, 0.68, 0.046, 0.67, 0.047),
            TaskResult("wikitext", "word_perplexity", 62, 12.0, None, 13.5, None),
        ],
        sparsity=[LayerSparsity(site, 0, 0.5, 0.5, 0.48), LayerSparsity(name, 1, None, None, 0.9)],
        histograms=[
            Histogram(site, 0, edges, [0, 0, 1, 9, 4, 0], [2, 5, 6, 1, 0, 0], 0.05, 0.1, 0.2),
            Histogram(name, 1, edges, [0] * 6, [0] * 6, 0.0, 0.0, 0.0),
        ],
        speed=[speed, dataclasses.replace(speed, batch=4)],
        curve=[
            CurvePoint(f"cats:sparsity={s},score=output", s, 1 + s**3, 0.01, s, None if s > 0.8 else 1 - s / 2)
            for s in (0.3, 0.5, 0.9)
        ],
        samples=[Sample(name, "dense\ntext", name)],
        kernels={"sandcat::sparse_mlp": speed.kernel},
        machine=machine("cpu"),
        commands=[name],
    )


def printed(report: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def spoken(report: Report) -> dict[str, str]:
    """Every output as plain text with single spaces."""
    page = re.sub(r"<style>.*?</style>|<dl>.*</dl>|<[^>]*>", " ", report.html(), flags=re.DOTALL)
    texts = {"table": printed(report), "markdown": report.markdown(), "html": page}
    return {name: " ".join(text.split()) for name, text in texts.items()}


class References(HTMLParser):
    """Collects everything in a page that could make a browser fetch or run something."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "audio", "video"):
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            value = value or ""
            fetches = name.split(":")[-1] in ("src", "href", "srcset", "background", "poster")
            if name.startswith("on") or (fetches and not value.startswith("#")):
                self.found.append(f"{name}={value}")
            self.check_css(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        if self.cdata_elem == "style" or "style" in self.tags[-1:]:
            self.check_css(data)

    def check_css(self, text):
        self.found += re.findall(r"url\(\s*[\"']?(?!#)[^)]*\)|@import|@font-face", text)


def test_json_round_trip():
    report = full()
    again = Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert again == report
    assert report.to_json()["format_version"] == 1
    assert Report.from_json(EMPTY.to_json()) == EMPTY


def test_a_figure_that_is_not_finite_is_null_and_said():
    report = full()
    text = dataclasses.replace(report.text[0], sparse_perplexity=float("inf"), ratio=float("nan"))
    report = dataclasses.replace(report, text=[text])
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["text"][0]["sparse_perplexity"] is None
    again = Report.from_json(data)
    assert again.to_json() == data
    for text in spoken(again).values():
        assert "not a number" in text and "nan" not in text.split()


@pytest.mark.parametrize("data", [{}, {"format_version": 2}, {"format_version": 1}])
def test_what_is_no_report_is_refused(data):
    with pytest.raises(CheckpointError):
        Report.from_json(data)


def test_write_leaves_two_files_and_replaces_them(tmp_path):
    for report in (EMPTY, full()):
        report.write(tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
    assert Report.from_json(json.loads((tmp_path / "new" / "report.json").read_text("utf-8"))) == full()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        EMPTY.write(tmp_path / "file")


@pytest.mark.parametrize("name", ["model", HOSTILE])
def test_page_refers_to_nothing_outside(name):
    page = full(name=name).html()
    seen = References(page)
    assert seen.found == []
    assert seen.tags.count("svg") == 6
    assert "xlink" not in page and "<metadata" not in page and "DOCTYPE svg" not in page
    if name == "model":
        assert "http:" not in page and "https:" not in page and "//" not in page


def test_hostile_names_are_text():
    page = full(name=HOSTILE).html()
    assert "<script" not in page and "<img" not in page
    assert "&lt;script src=" in page
    markdown = full(name=HOSTILE).markdown()
    assert "<script" not in markdown
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")} == {5}
    assert "[bold]" in printed(full(name=HOSTILE))


def test_empty_report_says_not_measured_and_leaves_sections_out():
    for text in spoken(EMPTY).values():
        assert text.count("not measured") >= 4
    titles = re.findall(r"<h2>(.*?)</h2>", EMPTY.html())
    assert titles == ["Model", "How to read it"]
    assert "<svg" not in EMPTY.html()


def test_sections_in_order():
    assert re.findall(r"<h2>(.*?)</h2>", full().html()) == [
        "Quality", "Speed", "Sparsity of each layer", "Activations and thresholds", "Quality against sparsity",
        "Samples", "Calibration", "Model", "Kernels", "Machine", "To print it again", "How to read it",
    ]  # fmt: skip


def test_pairs_hold_the_figures():
    for text in spoken(full()).values():
        text = text.replace("\u00a0", " ").replace(" | ", " ").replace("| ", "")
        for figures in (
            "Perplexity 14.20 15.00 1.056x ± 0.0042", "0.0610 ± 0.001", "88.0 ± 0.3 %",
            "68.0 ± 4.6 % 67.0 ± 4.7 % -1.0 points", "word_perplexity 12.00 13.50 +1.5",
            "Time a token 10.0 ms 8.00 ms -20.0 %",
            "Tokens a second 100.0 125.0 +25.0 %", "Bytes a token reads 200.0 MB 150.0 MB -25.0 %",
            "the bytes allow", "1.33x", "Gain measured", "1.25x",
            "Share of read bandwidth 66.7 % 62.5 %", "compiled eager, numba", "batch 4", "Tokens a second 400.0 500.0",
        ):  # fmt: skip
            assert figures in text
        assert "lower than dense" not in text and "nothing is saved" not in text
    assert full().summary() == (
        "Perplexity on model rises by 5.6 ± 0.4 %; a token takes 8.00 ms instead of 10.0 ms: 1.25x as fast, where the "
        "bytes allow 1.33x."
    )


def test_slower_than_dense_is_said():
    report = full(SLOW)
    for text in spoken(report).values():
        assert "Slower than dense: after 512 tokens at batch 1 a step takes 25" in text
        assert "0.80x: slower" in text
    assert "slower than dense by 25 %, where the bytes would allow 1.33x" in report.summary()


def test_the_reference_is_said():
    report = full(REFERENCE)
    for text in spoken(report).values():
        assert "no kernel pays for this device and batch: the reference ran, nothing is saved" in text
        assert "eager, reference" in text
        assert "150.0\u00a0MB by a kernel" in text.replace("150.0 MB", "150.0\u00a0MB")
    assert "nothing is saved" in report.summary()
    without = dataclasses.replace(report, kernels={})
    assert any("the reference ran" in note for note in without.notes())


@pytest.mark.parametrize(
    "kernel, said", [("masked", "here: what is dropped is read"), ("dense", "here, so the step runs")]
)
def test_a_step_that_saves_nothing_is_said(kernel, said):
    """Reports of before call it dense, as it was then."""
    report = full(dataclasses.replace(FAST, batch=8, kernel=kernel))
    for text in spoken(report).values():
        assert f"Batch 8: skipping does not pay for so many sequences at once {said}" in text
        assert f"eager, {kernel}" in text
    assert said in report.summary() and "nothing is saved" in report.summary()


def test_a_report_from_before_batches():
    data = full().to_json()
    del data["text"][0]["batch"]
    assert Report.from_json(data) == full()
    batched = dataclasses.replace(full().text[0], batch=4)
    assert "Quality on model, batch 4" in dataclasses.replace(full(), text=[full().text[0], batched]).pairs()


@pytest.mark.parametrize("name", ["model", HOSTILE, "a/very/long/path/" * 8])
@pytest.mark.parametrize("speed", [FAST, REFERENCE])
def test_table_fits_80_columns(name, speed):
    text = printed(full(speed, name))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_machine_names_what_it_ran_on():
    facts = machine("cpu")
    assert {"cpu", "threads", "python", "torch", "transformers", "sandcat"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
