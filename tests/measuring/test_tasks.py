"""Tasks through lm-eval: figures against a direct computation, local files, limits, and every error."""

from __future__ import annotations

import ast
import copy
import json
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.tasks import manager as lm_eval_manager
from lm_eval.utils import apply_template
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sandcat
from sandcat.data import Text
from sandcat.errors import DataError
from sandcat.layers.modes import every_token_sparse
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring import tasks
from sandcat.measuring.tasks import LAYOUTS, PAPER_TASKS, load_tasks


def run_tasks(dense, sparse, *args, **options):
    """For one sparse model."""
    return tasks.run_tasks(dense, [sparse], *args, **options)[0]


PIQA = [
    {"goal": "open a jar", "sol1": "twist", "sol2": "put it under a running train and wait", "label": 0},
    {"goal": "dry a shirt", "sol1": "bury it in wet sand for a week", "sol2": "hang it up", "label": 1},
    {"goal": "boil an egg", "sol1": "ten minutes in hot water", "sol2": "ask it", "label": 0},
    {"goal": "sharpen a pencil", "sol1": "eat", "sol2": "turn it in a sharpener, slowly", "label": 1},
    {"goal": "sort 'quotes', \"marks\" & {braces}", "sol1": "one \\ by one", "sol2": "42", "label": 0},
    {"goal": "cross a road", "sol1": "look left and right, then walk", "sol2": "run blind", "label": 0},
    {"goal": "find a cat", "sol1": "é", "sol2": "rattle a box of food near the door", "label": 1},
]
GENERIC = [
    {"query": "The sky is", "choices": ["blue", "made of cheese", "late"], "gold": 0, "extra": 1},
    {"query": "7", "choices": ["seven", "eight"], "gold": 0, "extra": 2},
    {"query": "Sand is", "choices": ["a liquid metal", "dry"], "gold": 1, "extra": 3},
]


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.fixture(scope="module")
def dense(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sparse(dense, tokenizer):
    model = copy.deepcopy(dense)
    text = Text(torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0)), "random", "")
    sandcat.sparsify(model, tokenizer, "cats:sparsity=0.7", calibration=text)
    return model


@pytest.fixture(scope="module")
def known():
    return lm_eval_manager.TaskManager()


@pytest.fixture
def one_list(known, monkeypatch):
    """lm-eval's list of tasks takes seconds to read: here it is read once."""
    monkeypatch.setattr(lm_eval_manager, "TaskManager", lambda include_defaults: known)


def written(folder, rows, name="questions.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def likelihoods(model, tokenizer, context, choices):
    """Log-likelihood of each choice after the context, in nats."""
    found = []
    for choice in choices:
        start = len(tokenizer(context)["input_ids"])
        ids_L = torch.tensor(tokenizer(f"{context} {choice}")["input_ids"])
        log_p = model(ids_L[None]).logits[0, :-1].log_softmax(-1)
        found.append(float(log_p.gather(1, ids_L[1:, None])[start - 1 :].sum()))
    return torch.tensor(found)


def right_by_character(model, tokenizer):
    """For each PIQA row whether the right choice wins by log-likelihood a character, and by log-likelihood alone."""
    wins = []
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        found = likelihoods(model, tokenizer, f"Question: {row['goal']}\nAnswer:", choices)
        lengths = torch.tensor([len(choice) for choice in choices])
        wins.append([int((found / lengths).argmax()) == row["label"], int(found.argmax()) == row["label"]])
    return torch.tensor(wins).double()


def test_piqa_file_against_a_direct_computation(dense, sparse, tokenizer, tmp_path):
    by_character, alone = right_by_character(dense, tokenizer).T
    assert not torch.equal(by_character, alone)  # else the normalisation is not tested
    with every_token_sparse(sparse):
        sparse_by_character = right_by_character(sparse, tokenizer)[:, 0]
    [result] = run_tasks(dense, sparse, tokenizer, [written(tmp_path, PIQA)], batch_size=3)
    assert (result.name, result.metric, result.examples) == ("questions.jsonl", "acc_norm", len(PIQA))
    assert result.dense == pytest.approx(float(by_character.mean()))
    assert result.sparse == pytest.approx(float(sparse_by_character.mean()))
    assert result.dense_error == pytest.approx(float(by_character.std()) / len(PIQA) ** 0.5)
    assert result.sparse_error == pytest.approx(float(sparse_by_character.std()) / len(PIQA) ** 0.5)


def test_the_piqa_layout_is_lm_evals_own(known):
    own = known.task_index["piqa"].cfg
    prompt, choices, right = LAYOUTS["goal", "sol1", "sol2", "label"]
    assert (own["doc_to_target"], own.get("target_delimiter", " ")) == (right, " ")
    for row in PIQA:
        assert apply_template(own["doc_to_text"], row) == prompt.format(**row)
        assert ast.literal_eval(apply_template(own["doc_to_choice"], row)) == [row[c] for c in choices]


def test_generic_file_as_lines_and_as_a_list(dense, sparse, tokenizer, tmp_path):
    expected = []
    for row in GENERIC:
        found = likelihoods(dense, tokenizer, row["query"], row["choices"])
        expected.append(int((found / torch.tensor([len(c) for c in row["choices"]])).argmax()) == row["gold"])
    whole = tmp_path / "list.json"
    whole.write_text(json.dumps(GENERIC, indent=1), encoding="utf-8")
    results = run_tasks(dense, sparse, tokenizer, [written(tmp_path, GENERIC), str(whole)])
    assert [result.name for result in results] == ["questions.jsonl", "list.json"]
    assert [result.dense for result in results] == pytest.approx([sum(expected) / 3] * 2)
    assert results[0].sparse == results[1].sparse


def test_a_sparse_model_that_drops_nothing_equals_the_dense_one(dense, sparse, tokenizer, tmp_path):
    nothing = copy.deepcopy(sparse)
    for module in sparse_modules(nothing).values():
        module.threshold.fill_(-1)
    [result] = run_tasks(dense, nothing, tokenizer, [written(tmp_path, PIQA)])
    assert (result.dense, result.dense_error) == (result.sparse, result.sparse_error)


@pytest.fixture(scope="module")
def shipped(dense, sparse, tokenizer):
    """`sparse`, but that it computes its prompts whole."""
    model = copy.deepcopy(dense)
    text = Text(torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0)), "random", "")
    sandcat.sparsify(model, tokenizer, "cats:sparsity=0.7,dense_prompt=true", calibration=text)
    for module, other in zip(*(sparse_modules(m).values() for m in (model, sparse)), strict=True):
        assert torch.equal(module.threshold, other.threshold)
    return model


def test_prompts_are_computed_sparsely_whatever_the_model_ships(dense, sparse, shipped, tokenizer, tmp_path):
    path = written(tmp_path, PIQA)
    assert tasks.run_tasks(dense, [sparse], tokenizer, [path]) == tasks.run_tasks(dense, [shipped], tokenizer, [path])
    ids = torch.tensor([tokenizer("a question")["input_ids"]])
    with torch.inference_mode():
        with every_token_sparse(shipped):
            assert torch.equal(shipped(ids).logits, sparse(ids).logits)
        assert not torch.equal(shipped(ids).logits, sparse(ids).logits)


@pytest.mark.parametrize("batch_size", [1, 8])
@torch.inference_mode()
def test_generated_answers_are_those_of_each_question_alone(
    dense, sparse, shipped, tokenizer, tmp_path, monkeypatch, one_list, batch_size
):
    """Whatever the batch, and the saved model's prompts: also through lm-eval's own command line."""
    from lm_eval.api.instance import Instance

    from sandcat import lm_eval_model

    def written_on(model, row):
        ids = tokenizer(row, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        return tokenizer.decode(out[0, ids.shape[1] :])

    rows = [row["goal"] for row in PIQA]  # but for where a model ends: there lm-eval's batches go on, and leave it out
    rows = [row for row in rows if "<end>" not in written_on(sparse, row) + written_on(dense, row)]
    want, exact = ([written_on(model, row) for row in rows] for model in (sparse, dense))
    assert len(rows) > 3
    assert want != exact
    options = {"until": ["<end>"], "max_gen_toks": 8}
    asked = [Instance("generate_until", {}, (row, options), number) for number, row in enumerate(rows)]
    monkeypatch.setattr(lm_eval_model, "load", lambda *args, **kwargs: (shipped, copy.deepcopy(tokenizer)))
    found = lm_eval_model.SandcatLM("folder", batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    assert found == want

    answered = [{"query": row, "choices": [text], "gold": 0} for row, text in zip(rows, want, strict=True)]
    task = described(
        tmp_path, "written", answered, output_type="generate_until", doc_to_choice=None, generation_kwargs=options,
        doc_to_target="{{choices[0]}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    [[of_sparse], [of_shipped]] = tasks.run_tasks(
        dense, [sparse, shipped], tokenizer, [str(tmp_path / "task.yaml")], batch_size=batch_size
    )
    assert of_sparse == of_shipped
    assert (of_sparse.metric, of_sparse.sparse) == ("exact_match", 1.0) and of_sparse.dense < 1


def test_limit_and_repeated_names(dense, sparse, tokenizer, tmp_path):
    path = written(tmp_path, PIQA)
    [result] = run_tasks(dense, sparse, tokenizer, [path, path], limit=3)
    assert result.examples == 3
    assert result.dense == pytest.approx(float(right_by_character(dense, tokenizer)[:3, 0].mean()))
    assert run_tasks(dense, sparse, tokenizer, load_tasks([path]), limit=3) == [result]
    [single] = run_tasks(dense, sparse, tokenizer, [path], limit=1)
    assert single.examples == 1 and single.dense_error is None and single.sparse_error is None
    [more] = run_tasks(dense, sparse, tokenizer, [path], limit=100)
    assert more.examples == len(PIQA)


def test_shots_are_the_same_for_both_models_and_follow_the_seed(dense, tokenizer, tmp_path, monkeypatch):
    prompts = []
    encode = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, text, **k: prompts.append(text) or encode(self, text, **k)
    )
    encode_only = PreTrainedTokenizerFast.encode
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "encode", lambda self, text, **k: prompts.append(text) or encode_only(self, text, **k)
    )
    path = written(tmp_path, PIQA)
    run_tasks(dense, dense, tokenizer, [path], shots=2, seed=0)
    first, second = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    assert first == second and all(str(prompt).count("Question:") == 3 for prompt in first)
    prompts.clear()
    run_tasks(dense, dense, tokenizer, [path], shots=2, seed=1)
    assert prompts[: len(prompts) // 2] != first


def test_it_is_quiet_and_leaves_everything_as_it_was(dense, sparse, tokenizer, tmp_path, capfd):
    names = ("lm_eval", "datasets", "huggingface_hub", "transformers")
    before = [logging.getLogger(name).level for name in names], tqdm.__init__, tokenizer.pad_token
    random = torch.get_rng_state()
    run_tasks(dense, sparse, tokenizer, [written(tmp_path, PIQA)])
    with pytest.raises(DataError):
        run_tasks(dense, sparse, tokenizer, [written(tmp_path, [])])
    assert before == ([logging.getLogger(name).level for name in names], tqdm.__init__, tokenizer.pad_token)
    assert torch.equal(random, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_answer(dense, sparse, tokenizer, tmp_path, monkeypatch):
    shown = {}

    def track(items, description):
        shown[description] = [len(items), 0]
        for item in items:
            shown[description][1] += 1
            yield item

    monkeypatch.setattr(tasks, "track", track)
    run_tasks(dense, sparse, tokenizer, [written(tmp_path, PIQA)])
    requests = 2 * len(PIQA)
    assert shown == {f"questions.jsonl, {word}": [requests, requests] for word in ("dense", "sparse")}


def described(folder, name, rows, **more):
    """The lm-eval description of a task on a local file."""
    rows = [{key: row[key] for key in ("query", "choices", "gold")} for row in rows]
    return {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {
            "data_files": {"test": written(folder, rows, f"{name}.jsonl")}, "cache_dir": str(folder / "cache"),
        },
        "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], **more,
    }  # fmt: skip


def test_yaml_task(dense, sparse, tokenizer, tmp_path, one_list):
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(described(tmp_path, "one", GENERIC)))  # JSON is YAML
    [result] = run_tasks(dense, sparse, tokenizer, [str(path)])
    assert (result.name, result.metric, result.examples) == ("one", "acc", 3)


def test_groups_and_tags(dense, sparse, tokenizer, tmp_path, monkeypatch):
    one = described(tmp_path, "one", GENERIC, tag="both")
    two = described(tmp_path, "two", GENERIC[:2], tag="both")
    sums = [{"metric": "acc", "weight_by_size": True}]
    files = [
        one, two, {"group": "summed", "task": ["one", "two"], "aggregate_metric_list": sums},
        {"group": "plain", "task": ["one", "two"]}, {"group": "outer", "task": ["summed"]},
    ]  # fmt: skip
    for number, content in enumerate(files):
        (tmp_path / f"{number}.yaml").write_text(json.dumps(content))
    manager = lm_eval_manager.TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(lm_eval_manager, "TaskManager", lambda include_defaults: manager)

    def rows(name):
        return {result.name: result for result in run_tasks(dense, sparse, tokenizer, [name])}

    apart, together = rows("plain"), rows("summed")
    assert {name: result.examples for name, result in apart.items()} == {"one": 3, "two": 2}
    assert rows("both") == apart and rows("outer") == together and list(together) == ["summed"]
    assert together["summed"].examples == 5
    assert together["summed"].dense == pytest.approx((3 * apart["one"].dense + 2 * apart["two"].dense) / 5)
    assert len(run_tasks(dense, sparse, tokenizer, ["one", "plain", "summed"])) == 4


def test_metric_of_a_task():
    def metric(name, **figures):
        figures = {key.replace("__", ","): value for key, value in figures.items()}
        return tasks._result(name, {"sample_len": 2, **figures}, figures).metric

    both = {"acc__none": 0.5, "acc_stderr__none": 0.1, "acc_norm__none": 0.6, "acc_norm_stderr__none": 0.1}
    assert metric("piqa", **both) == "acc"
    assert metric("other", **both) == "acc_norm"
    assert metric("words", ppl__none=9.0, ppl_stderr__none="N/A", em__strict=0.5, em_stderr__strict=0.1) == "em,strict"
    assert metric("words", ppl__none=9.0, ppl_stderr__none="N/A") == "ppl"


BAD_FILES = {
    "empty": ("", "is empty"),
    "blank lines": ("\n \n", "is empty"),
    "not JSON": ('{"query": "a"}\n{"query', "not JSON (from line 2"),
    "not rows": ("1\n2\n", "something other than rows"),
    "unknown columns": ('{"question": "a", "answer": "b"}', "question, answer"),
    "missing column": ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "gold": 0}', "question 2"),
    "mixed types": (
        '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "choices": "b", "gold": 0}',
        "question 2",
    ),
    "gold too large": ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "question 1"),
    "gold hidden": ('{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}', "question 1"),
    "gold is true": ('{"query": "a", "choices": ["b", "c"], "gold": true}', "question 1"),
    "gold is text": ('{"query": "a", "choices": ["b", "c"], "gold": "b"}', "question 1"),
    "one choice": ('{"query": "a", "choices": ["b"], "gold": 0}', "question 1"),
    "blank choice": ('{"query": "a", "choices": ["b", " "], "gold": 0}', "question 1"),
    "numbers as choices": ('{"query": "a", "choices": [1, 2], "gold": 0}', "question 1"),
    "choices are text": ('{"query": "a", "choices": "b", "gold": 0}', "question 1"),
    "null": ('{"goal": null, "sol1": "b", "sol2": "c", "label": 0}', "question 1"),
    "query is a number": ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "question 1"),
}


def never(*args, **kwargs):
    raise AssertionError("a model ran before everything was checked")


@pytest.fixture
def idle(dense, monkeypatch):
    """Arguments of `run_tasks` whose models must not run."""
    model = copy.deepcopy(dense)
    monkeypatch.setattr(model, "forward", never)
    return model, model


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, idle, tokenizer, tmp_path):
    content, expected = BAD_FILES[case]
    good, bad = written(tmp_path, PIQA, "good.jsonl"), tmp_path / "bad.jsonl"
    bad.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        run_tasks(*idle, tokenizer, [good, str(bad)])
    assert expected in str(error.value) and "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_unknown_columns_name_the_known_ones(idle, tokenizer, tmp_path):
    with pytest.raises(DataError, match="goal, sol1, sol2, label or query, choices, gold"):
        run_tasks(*idle, tokenizer, [written(tmp_path, [{"text": "a"}])])


def test_file_that_is_missing_binary_or_of_another_kind(idle, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no task file"):
        run_tasks(*idle, tokenizer, ["missing.jsonl"])
    with pytest.raises(DataError, match="no task file"):
        run_tasks(*idle, tokenizer, [str(tmp_path)])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        run_tasks(*idle, tokenizer, [str(tmp_path / "binary.jsonl")])
    (tmp_path / "whole.json").write_text("[{")
    with pytest.raises(DataError, match="is not JSON"):
        run_tasks(*idle, tokenizer, [str(tmp_path / "whole.json")])


def test_numbers_out_of_range(idle, tokenizer, tmp_path):
    path = written(tmp_path, PIQA)
    for options in ({"limit": 0}, {"shots": -1}, {"batch_size": 0}):
        with pytest.raises(DataError, match="give at least 1"):
            run_tasks(*idle, tokenizer, [path], **options)
    with pytest.raises(DataError, match="too few for 7 solved ones"):
        run_tasks(*idle, tokenizer, [path], shots=len(PIQA))
    assert run_tasks(*idle, tokenizer, []) == []


def test_unknown_name(idle, tokenizer, tmp_path, one_list):
    for check in (load_tasks, lambda names: run_tasks(*idle, tokenizer, names)):
        with pytest.raises(DataError, match=r"no task 'piqqa'; did you mean 'piqa'\?"):
            check([written(tmp_path, PIQA), "paper", "piqqa"])


def test_data_that_cannot_be_loaded(idle, tokenizer, tmp_path, one_list):
    with pytest.raises(DataError, match=r"task 'arc_easy' cannot be loaded .*network.* local file"):
        run_tasks(*idle, tokenizer, ["arc_easy"])
    (tmp_path / "bad.yaml").write_text("just: this")
    with pytest.raises(DataError, match=r"bad\.yaml' cannot be loaded"):
        run_tasks(*idle, tokenizer, [str(tmp_path / "bad.yaml")])


def test_tasks_that_would_run_code_are_refused(idle, tokenizer, tmp_path, one_list):
    (tmp_path / "code.yaml").write_text(json.dumps(described(tmp_path, "code", GENERIC, unsafe_code=True)))
    with pytest.raises(DataError, match="not supported"):
        run_tasks(*idle, tokenizer, [str(tmp_path / "code.yaml")])


def test_the_paper_has_eight_known_tasks(known):
    assert len(PAPER_TASKS) == 8 and all(name in known.task_index for name in PAPER_TASKS)


def test_without_lm_eval(idle, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.manager", None)
    with pytest.raises(DataError, match=r"pip install sandcat\[eval\]"):
        run_tasks(*idle, tokenizer, ["piqa"])


def test_importing_sandcat_does_not_import_lm_eval():
    code = "import sys, sandcat, sandcat.tasks; assert not {'lm_eval', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
