"""sandcat serve, asked by the official openai client, with each engine that is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from sandcat.checkpoints.embedded import EMBEDDED
from sandcat.checkpoints.load import load
from sandcat.checkpoints.save import save
from sandcat.data import Text
from sandcat.errors import CheckpointError
from sandcat.pipeline import sparsify

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

ENGINES = [
    pytest.param("transformers"),
    pytest.param("vllm", marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")),
]
KEY = "sand"
NUMBERS = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model with a mild plan, so that it can still count."""
    try:
        model, tokenizer = load(EMBEDDED)
    except CheckpointError as error:
        pytest.skip(str(error))
    ids = tokenizer(Path(socket.__file__).read_text()[:8000], return_tensors="pt")["input_ids"]
    text = Text(ids[:, : ids.shape[1] // 128 * 128].view(-1, 128), "source code", "0" * 64)
    sparsify(model, tokenizer, ["cats:sparsity=0.3,score=output"], calibration=text)
    return save(model, tokenizer, tmp_path_factory.mktemp("serve") / "small-cats")


@pytest.fixture(scope="module", params=ENGINES)
def server(request, folder, tmp_path_factory):
    """(engine, base URL) of a running server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [
        sys.executable, "-m", "sandcat", "serve", folder, "--engine", request.param, "--port", str(port),
        "--max-context", "256", "--max-new-tokens", "64", "--dtype", "float32",
        *(["--enforce-eager", "--max-num-seqs", "8"] if request.param == "vllm" else []),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "SANDCAT_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if urllib.request.urlopen(f"{url}/health").status == 200:
                    break
            except OSError:
                time.sleep(0.5)
        yield request.param, f"{url}/v1"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[1], api_key=KEY, max_retries=0, timeout=240)


def count_from(client, start: str, **options):
    prompt = f"Count: {', '.join(NUMBERS)}. Again, the same: {start},"
    return client.completions.create(model="small-cats", prompt=prompt, max_tokens=8, temperature=0, **options)


def test_models_and_health(client):
    assert [model.id for model in client.models.list()] == ["small-cats"]


def test_completion_usage_and_stop(client):
    whole = count_from(client, "one")
    assert whole.choices[0].text.startswith(" two, three")
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    stopped = count_from(client, "one", stop=[" three"])
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens < 8
    assert stopped.choices[0].text.removesuffix(" three") == " two,"  # transformers' server leaves what it stopped at


def test_streaming_gives_the_same_text(client):
    pieces = [c.choices[0].text for c in count_from(client, "two", stream=True) if c.choices]
    assert len(pieces) > 2 and "".join(pieces) == count_from(client, "two").choices[0].text


def test_chat_is_seeded(client):
    def say(seed: int) -> str:
        message = [{"role": "user", "content": "Name an animal and say why."}]
        asked = client.chat.completions.create(
            model="small-cats", messages=message, max_completion_tokens=12, temperature=1.0, seed=seed
        )
        return asked.choices[0].message.content

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_answers_of_clients_at_once_do_not_mix(client):
    alone = {start: count_from(client, start).choices[0].text for start in NUMBERS[:4]}
    found: dict[int, tuple[str, str]] = {}

    def ask(index: int) -> None:
        start = NUMBERS[index % 4]
        found[index] = (start, count_from(client, start).choices[0].text)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(text == alone[start] for start, text in found.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt"},
        {"prompt": "word " * 400},
        {"max_tokens": 1000},
        {"max_tokens": -1},
        {"temperature": -1.0},
    ],
    ids=str,
)
def test_bad_requests_are_the_clients_fault(client, changes):
    asked = {"model": "small-cats", "prompt": "a", "max_tokens": 4, **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**asked)
    assert 400 <= caught.value.status_code < 500
    assert re.search(r"\w", str(caught.value))
    assert count_from(client, "one").choices[0].text.startswith(" two")  # and it goes on serving


def test_the_key_is_asked_for(server):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server[1], api_key="other", max_retries=0).models.list()


def test_answers_are_no_longer_than_allowed(client):
    said = client.completions.create(model="small-cats", prompt="Once upon a time", max_tokens=100, temperature=0)
    assert said.usage.completion_tokens <= 64
