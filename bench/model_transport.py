"""What 1,000 calls at once cost over each way to send them: `python -m bench.model_transport`.

A server of another process answers each call after a second, with a stream of 10 words or of 500. The ways
take turns, each in a process of its own, so that what else the machine does hits all of them alike; the best
of three rounds counts. Results go to bench/results/model_transport.json.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anthropic import AsyncAnthropic, DefaultAioHttpClient, DefaultAsyncHttpxClient

from orchestrator.conversation import Told
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.port import ModelRequest
from orchestrator.models.sdk import anthropic_api
from tests.fakes.anthropic_server import Play, Say, Slow, serve

RESULTS = Path(__file__).parent / "results" / "model_transport.json"
CALLS = 1_000
SECONDS = 1.0
WORDS = (10, 500)
ROUNDS = 3

Call = Callable[[], Awaitable[str]]


def ours(url: str) -> tuple[Call, Callable[[], Awaitable[None]]]:
    """The client that runs use."""
    client = AnthropicClient(anthropic_api("key", url))
    request = ModelRequest(
        model="m", system="", conversation=(Told("hi"),), python_tool=False, max_tokens=4_096, timeout_s=60.0
    )

    async def call() -> str:
        return (await client.complete(request)).reply.text

    return call, client.aclose


def sdk(url: str, *, aiohttp: bool, streams: bool) -> tuple[Call, Callable[[], Awaitable[None]]]:
    """The SDK as its documentation shows it."""
    http: Any = DefaultAioHttpClient() if aiohttp else DefaultAsyncHttpxClient()
    client = AsyncAnthropic(api_key="key", base_url=url, max_retries=0, http_client=http)
    asked: Any = {"model": "m", "max_tokens": 4_096, "messages": [{"role": "user", "content": "hi"}]}

    async def call() -> str:
        message = await client.messages.create(**asked)
        return "".join(block.text for block in message.content if block.type == "text")

    async def call_streamed() -> str:
        async with client.messages.stream(**asked) as stream:
            message = await stream.get_final_message()
        return "".join(block.text for block in message.content if block.type == "text")

    return (call_streamed if streams else call), client.close


WAYS: dict[str, Callable[[str], tuple[Call, Callable[[], Awaitable[None]]]]] = {
    "ours": ours,
    "aiohttp": lambda url: sdk(url, aiohttp=True, streams=False),
    "aiohttp, stream helper": lambda url: sdk(url, aiohttp=True, streams=True),
    "httpx2": lambda url: sdk(url, aiohttp=False, streams=False),
    "httpx2, stream helper": lambda url: sdk(url, aiohttp=False, streams=True),
}


async def measure(way: str, url: str, words: int) -> dict[str, float]:
    """One round: all calls at once, after one that opens what is opened once."""
    call, close = WAYS[way](url)
    await call()
    started_s, cpu_s = time.monotonic(), time.process_time()
    replies = await asyncio.gather(*(call() for _ in range(CALLS)))
    wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    await close()
    assert [len(reply.split()) for reply in replies] == [words] * CALLS
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), "rss_mib": round(rss_mib)}


async def serve_until_told(words: int) -> None:
    """The server's process: prints its address, ends with its standard input."""

    def respond(_body: dict[str, Any]) -> Play:
        return Slow(SECONDS, Say(" ".join(["word"] * words)))

    async with serve(respond) as server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def run_round(way: str, words: int) -> dict[str, float]:
    """One measurement in a fresh process against a fresh server."""
    me = [sys.executable, "-m", "bench.model_transport"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*me, "--serve", str(words)], **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        command = [*me, "--measure", way, "--url", url, "--words", str(words)]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        server.stdin.close()
    measured: dict[str, float] = json.loads(told.stdout)
    return measured


def compare() -> None:
    """All ways, in turns; the best round of each."""
    results: list[dict[str, Any]] = []
    for words in WORDS:
        rounds = [{way: run_round(way, words) for way in WAYS} for _ in range(ROUNDS)]
        for way in WAYS:
            best = min((one[way] for one in rounds), key=lambda measured: measured["cpu_s"])
            results.append({"way": way, "words": words, **best})
            print(f"{words:>4} words  {way:<24} {best['wall_s']:6.2f} s wall  {best['cpu_s']:6.2f} s CPU")
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    packages = {name: version(name) for name in ("anthropic", "httpx2", "aiohttp")}
    head = {"at": time.strftime("%Y-%m-%d"), "calls": CALLS, "seconds": SECONDS, "best_of": ROUNDS}
    RESULTS.write_text(json.dumps({**head, **machine, **packages, "results": results}, indent=1) + "\n")


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description="What 1,000 calls at once cost over each transport.")
    parser.add_argument("--serve", type=int, metavar="WORDS", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--words", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(serve_until_told(given.serve))
    elif given.measure is not None:
        print(json.dumps(asyncio.run(measure(given.measure, given.url, given.words))))
    else:
        compare()


if __name__ == "__main__":
    main()
