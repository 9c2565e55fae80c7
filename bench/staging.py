"""Staging against what copying and hashing costs anybody: `python -m bench.staging [--megabytes N]`.

The yardstick reads a file with `sha256sum`, then copies it with `cp`; ours makes it valid UTF-8, counts its
characters and lines, notes landmarks, hashes and copies it, in one pass. Nobody waits for the disk: the file
is in the page cache, and neither flushes what it wrote. Both take turns. What staging does to the event loop
of its process is the delay of a task that wakes every millisecond meanwhile; `idle` is the same without it.
"""

import argparse
import asyncio
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.measuring import at_least, keep, spread_ms
from bench.texts import ALPHABETS, write_text
from orchestrator.contexts.store import ContextStore
from orchestrator.ids import LOCAL_TENANT

_ROUNDS = 3
_WAKE_S = 0.001
_IDLE_S = 1.0
_FILES = 20_000
_FILE_BYTES = 1_000


async def measure_text(directory: Path, kind: str, megabytes: int) -> dict[str, object]:
    """Seconds of both for one text, their ratio, and the event loop's delays."""
    source, copy = directory / kind, directory / "copy"
    write_text(source, kind, megabytes * 1_000_000)
    store = ContextStore(directory / "store")

    def yardstick() -> None:
        _run("sha256sum", str(source))
        _run("cp", str(source), str(copy))

    def ours() -> None:
        store.release(store.stage_paths(LOCAL_TENANT, [source]))

    plain_s: list[float] = []
    ours_s: list[float] = []
    delays_s: list[float] = []
    for _ in range(1 + _ROUNDS):
        plain_s.append(_took_s(yardstick))
        copy.unlink()
        ours_s.append(_took_s(ours))
        delays_s += await _delays_s(ours)
    store.close()
    length_bytes = source.stat().st_size
    source.unlink()
    # The first round warms up.
    plain, own = statistics.median(plain_s[1:]), statistics.median(ours_s[1:])
    return {
        "bytes": length_bytes,
        "sha256sum_and_cp_s": round(plain, 3),
        "staging_s": round(own, 3),
        "staging_mb_per_s": round(length_bytes / own / 1e6),
        "speed_ratio": round(plain / own, 2),
        "event_loop_delay_ms": spread_ms(delays_s),
    }


async def _delays_s(work: Callable[[], None]) -> list[float]:
    """How much later than asked for a task woke, each time, while `work` ran in a thread."""
    delays_s: list[float] = []
    working = asyncio.create_task(asyncio.to_thread(work))
    while not working.done():
        asked_s = time.perf_counter()
        await asyncio.sleep(_WAKE_S)
        delays_s.append(time.perf_counter() - asked_s - _WAKE_S)
    await working
    return delays_s


def measure_files(directory: Path) -> dict[str, object]:
    """Many small files, against `sha256sum` and `cp` over all of them."""
    tree, copy = directory / "tree", directory / "copy"
    for number in range(_FILES):
        file = tree / f"{number // 100:03}" / f"{number % 100:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d\n" % number + b"x" * (_FILE_BYTES - 10))
    store = ContextStore(directory / "store")

    def yardstick() -> None:
        _run("find", str(tree), "-type", "f", "-exec", "sha256sum", "{}", "+")
        _run("cp", "-r", str(tree), str(copy))

    plain_s: list[float] = []
    ours_s: list[float] = []
    for _ in range(_ROUNDS):
        plain_s.append(_took_s(yardstick))
        _run("rm", "-r", str(copy))
        ours_s.append(_took_s(lambda: store.release(store.stage_paths(LOCAL_TENANT, [tree]))))
    store.close()
    own = statistics.median(ours_s)
    return {
        "files": _FILES,
        "file_bytes": _FILE_BYTES,
        "sha256sum_and_cp_s": round(statistics.median(plain_s), 3),
        "staging_s": round(own, 3),
        "files_per_s": round(_FILES / own),
    }


def _run(tool: str, *arguments: str) -> None:
    found = shutil.which(tool)
    assert found is not None, f"{tool} is missing"
    subprocess.run([found, *arguments], check=True, stdout=subprocess.DEVNULL)


def _took_s(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


async def measure(megabytes: int) -> dict[str, object]:
    """All texts and many files."""
    with tempfile.TemporaryDirectory(prefix="rlm") as place:
        directory = Path(place)
        idle_s = await _delays_s(lambda: time.sleep(_IDLE_S))
        texts = {kind: await measure_text(directory, kind, megabytes) for kind in ALPHABETS}
        files = await asyncio.to_thread(measure_files, directory)
    aims = [
        at_least(f"staging {megabytes:,} MB, {kind}, against sha256sum + cp", row["speed_ratio"], 0.7, "×")  # type: ignore[arg-type]
        for kind, row in texts.items()
    ]
    return {"aims": aims, "texts": texts, "files": files, "idle_event_loop_delay_ms": spread_ms(idle_s)}


def main() -> None:
    """Print the figures and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1_000)
    measured = asyncio.run(measure(parser.parse_args().megabytes))
    for what in measured.items():
        print(*what)
    keep("staging", measured)


if __name__ == "__main__":
    main()
