"""What it costs that the key is in a process of its own: `python -m bench.provider_process`.

1,000 calls of 200 ms each, 100 at a time, once with the provider's library in this process and once through
the provider process; prompts of 1 kB and of 100 kB, replies of 10 words. The provider is a fake in another
process. The ways take turns, each in a process of its own; the round with the least CPU counts. `late` is by
how much a call took longer than 200 ms; `alone` is what a call takes that is answered at once, with no other
beside it. Results go to bench/results/provider_process.json.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from bench import measuring
from bench.processes import cpu_s, memory_mib
from orchestrator.conversation import Told
from orchestrator.models.port import ModelClient, ModelRequest
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.provider.sealed import SealedCredentials
from tests.fakes.anthropic_server import Play, Say, Slow, serve

CALLS, AT_ONCE, CALL_S = 1_000, 100, 0.2
PROMPT_BYTES = (1_000, 100_000)
ROUNDS = 3
WAYS = ("in this process", "provider process")
KEY = "sk-ant-of-a-benchmark"
AT_ONCE_PLEASE = "now "
"""The beginning of a prompt that the server answers without a wait."""


@asynccontextmanager
async def in_this_process(url: str) -> AsyncIterator[tuple[ModelClient, int | None]]:
    """As it was before."""
    from orchestrator.models.anthropic_client import AnthropicClient  # noqa: PLC0415 - a second, and 75 MB
    from orchestrator.models.sdk import anthropic_api  # noqa: PLC0415

    client = AnthropicClient(anthropic_api(KEY, url))
    yield client, None
    await client.aclose()


@asynccontextmanager
async def provider_process(url: str) -> AsyncIterator[tuple[ModelClient, int | None]]:
    """As runs do it."""
    with ProviderProcess(SealedCredentials.of({"ANTHROPIC_API_KEY": KEY}), base_url=url) as process:
        connection = await connect(process)
        yield connection.client, process.pid
        await connection.client.aclose()


async def measure(way: str, url: str, prompt_bytes: int) -> dict[str, Any]:
    """One round, after calls that open what is opened once."""
    request = ModelRequest(
        model="m",
        system="",
        conversation=(Told("word " * (prompt_bytes // 5)),),
        python_tool=False,
        max_tokens=4_096,
        timeout_s=60.0,
    )
    opened = in_this_process(url) if way == WAYS[0] else provider_process(url)
    late_s: list[float] = []
    async with opened as (client, pid):
        slots = asyncio.Semaphore(AT_ONCE)

        async def call() -> None:
            async with slots:
                began_s = time.perf_counter()
                await client.complete(request)
                late_s.append(time.perf_counter() - began_s - CALL_S)

        at_once = replace(request, conversation=(Told(AT_ONCE_PLEASE * (prompt_bytes // 4)),))
        alone = {"alone": lambda: client.complete(at_once)}
        alone_s = (await measuring.take_turns(alone, times=300, warm_up=20))["alone"]
        began_s, own_s, others_s = time.monotonic(), time.process_time(), cpu_s(pid) if pid else 0.0
        await asyncio.gather(*(call() for _ in range(CALLS)))
        return {
            "wall_s": round(time.monotonic() - began_s, 2),
            "orchestrator_cpu_s": round(time.process_time() - own_s, 2),
            "provider_cpu_s": round(cpu_s(pid) - others_s, 2) if pid else 0.0,
            "alone_ms": measuring.spread_ms(alone_s),
            "late_ms": measuring.spread_ms(late_s),
            "orchestrator_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "provider_peak_mib": int(memory_mib(pid)["peak"]) if pid else 0,
        }


async def serve_until_told() -> None:
    """The server's process: prints its address, ends with its standard input."""

    def respond(body: dict[str, Any]) -> Play:
        reply = Say(" ".join(["word"] * 10))
        at_once = body["messages"][0]["content"][0]["text"].startswith(AT_ONCE_PLEASE)
        return reply if at_once else Slow(CALL_S, reply)

    async with serve(respond) as server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


def run_round(way: str, prompt_bytes: int) -> dict[str, Any]:
    """One measurement in a fresh process against a fresh server."""
    me = [sys.executable, "-m", "bench.provider_process"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*me, "--serve"], **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        command = [*me, "--measure", way, "--url", url, "--prompt-bytes", str(prompt_bytes)]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        server.stdin.close()
    measured: dict[str, Any] = json.loads(told.stdout)
    return measured


def compare() -> None:
    """Both ways, in turns; the best round of each."""
    results = []
    for prompt_bytes in PROMPT_BYTES:
        rounds = [{way: run_round(way, prompt_bytes) for way in WAYS} for _ in range(ROUNDS)]
        for way in WAYS:
            best = min((one[way] for one in rounds), key=lambda measured: measured["orchestrator_cpu_s"])
            results.append({"way": way, "prompt_bytes": prompt_bytes, **best})
            print(
                f"{prompt_bytes:>7} B  {way:<17} {best['orchestrator_cpu_s']:5.2f} s CPU here,"
                f" {best['provider_cpu_s']:5.2f} s there, {best['orchestrator_peak_mib']} and"
                f" {best['provider_peak_mib']} MiB, alone p50 {best['alone_ms']['p50']:.1f} ms,"
                f" p99 {best['alone_ms']['p99']:.1f} ms, late p50 {best['late_ms']['p50']:.1f} ms,"
                f" p99 {best['late_ms']['p99']:.1f} ms"
            )
    setting = {"calls": CALLS, "at_once": AT_ONCE, "call_s": CALL_S, "best_of": ROUNDS}
    load = os.getloadavg()[0]
    print(measuring.keep("provider_process", {**setting, "load": load, "results": results}))


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    parser = argparse.ArgumentParser(description="What it costs that the key is in a process of its own.")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--prompt-bytes", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve_until_told())
    elif given.measure is not None:
        print(json.dumps(asyncio.run(measure(given.measure, given.url, given.prompt_bytes))))
    else:
        compare()


if __name__ == "__main__":
    main()
