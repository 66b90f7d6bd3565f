"""A model served by vLLM, dense and sparse side by side: throughput and latency for some numbers of clients.

    python benchmarks/serve.py OUT --dense smollm2-135m --clients 1,4,16,64 -- --max-num-seqs 64 --enforce-eager

Both servers run all the time, with the same options (after --), and are measured in turns. Every client sends one
request after the other, each with a prompt of its own; prompts are not cached. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI

from sandcat.checkpoints.embedded import resolve
from sandcat.serving.engines import Service, vllm_command

WORDS = (
    "sand", "cat", "dune", "night", "wind", "stone", "star", "water", "moon", "fox", "heat", "rock", "track", "palm",
    "dust", "sky", "rain", "root",
)  # fmt: skip


def start(folder: str, port: int, dtype: str, more: list[str]) -> subprocess.Popen:
    service = Service(folder, "model", port=port, dtype=dtype, more=["--no-enable-prefix-caching", *more])
    with Path(f"serve-{port}.log").open("w") as log:
        return subprocess.Popen(vllm_command(service), stdout=log, stderr=log)


def wait(port: int, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"a server ended: see serve-{port}.log")


async def ask(client: AsyncOpenAI, prompt: str, new: int) -> tuple[float, float, str]:
    """Seconds to the first token, seconds a token after it, and the text."""
    begin, first, pieces = time.perf_counter(), None, []
    stream = await client.completions.create(
        model="model", prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            first = first or time.perf_counter()
            pieces.append(chunk.choices[0].text)
    end = time.perf_counter()
    return first - begin, (end - first) / (new - 1), "".join(pieces)


async def load(port: int, clients: int, requests: int, words: int, new: int, salt: int) -> dict[str, float]:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600) as client:

        async def one(number: int) -> list[tuple[float, float, str]]:
            found = []
            for turn in range(requests):
                seed = 7919 * number + 104729 * turn + salt
                prompt = " ".join(WORDS[(seed // (i + 1) + i * i) % len(WORDS)] for i in range(words))
                found.append(await ask(client, prompt, new))
            return found

        begin = time.perf_counter()
        found = [row for rows in await asyncio.gather(*map(one, range(clients))) for row in rows]
        seconds = time.perf_counter() - begin
    firsts, nexts, _ = zip(*found, strict=True)
    return {
        "tokens/s": len(found) * new / seconds,
        "first, ms": 1e3 * statistics.median(firsts),
        "next, ms": 1e3 * statistics.median(nexts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dense", required=True)
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=4, help="a round has so many, or one a client")
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--port", type=int, default=8100)
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args, more = parser.parse_args(ours), sys.argv[len(ours) + 2 :]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folders = {"dense": resolve(args.dense), "sparse": args.folder}
    ports = {kind: args.port + i for i, kind in enumerate(folders)}
    servers = {kind: start(folder, ports[kind], args.dtype, more) for kind, folder in folders.items()}
    try:
        for kind, server in servers.items():
            wait(ports[kind], server)
            asyncio.run(load(ports[kind], 2, 1, args.words, 4, 0))  # warm
        print(f"{'clients':>7} {'':>10} {'dense':>9} {'sparse':>9} {'change':>8}")
        for clients in map(int, args.clients.split(",")):
            requests, found = -(-args.requests // clients), {kind: [] for kind in folders}
            for turn in range(args.rounds):
                for kind in folders:
                    run = load(ports[kind], clients, requests, args.words, args.new, turn + 31 * clients)
                    found[kind].append(asyncio.run(run))
            for what in found["dense"][0]:
                dense, sparse = (statistics.median(row[what] for row in found[kind]) for kind in folders)
                print(
                    f"{clients:>7} {what:>10} {dense:>9.1f} {sparse:>9.1f} {100 * (sparse / dense - 1):>+7.1f}%",
                    flush=True,
                )
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            server.wait()


if __name__ == "__main__":
    main()
