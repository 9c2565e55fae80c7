"""The same cell through two peers and through us: `python -m bench.peers`.

`rlms` (the reference library, its Docker environment) and `llm-sandbox`, as they are on PyPI, in a virtual
environment of their own: `rlm` is an import name of theirs. Both get an image made from our base, because
their own ones come from a registry; what they would install into it is in there already. One process has all
of the peers' sandboxes open, this one has ours, and they take turns; only the cell is timed, never the start.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import docker
from docker.errors import ImageNotFound

from bench.cells import our_sandbox
from bench.measuring import at_least, keep, spread_ms, timed_s
from orchestrator.config import Settings
from orchestrator.sandbox import image as sandbox_image
from orchestrator.sandbox.docker_driver import connect_engine

PEERS = ("rlms==0.1.3", "llm-sandbox[docker]==0.3.46")
_IN_THEIR_IMAGE = ("dill==0.4.1", "requests==2.34.2", "ipython==9.10.0", "pip==26.3")
_DOCKERFILE = """
FROM {base}
COPY packages/ /usr/lib/python3/dist-packages/
RUN ln -s python3 /usr/bin/python && mkdir /workspace \\
    && python3 -m venv --without-pip --system-site-packages /sandbox/.sandbox-venv \\
    && cd /sandbox/.sandbox-venv/bin \\
    && printf '#!/bin/sh\\nexec /sandbox/.sandbox-venv/bin/python -m pip "$@"\\n' >pip && chmod +x pip
CMD ["python3"]
"""
_PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check")
_PLACE = Path("build") / "peers"
_CONTEXTS = {"1 kB": 1_000, "10 MB": 10_000_000}
_TURNS = 15
_OURS_IN_A_TURN = 10
_AIM = 100.0
_READY_S = 120.0
_CELL_S = 60.0


class Peers:
    """The process that has the peers' sandboxes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.ready: list[str] = []
        self.failed: dict[str, str] = {}

    async def wait_ready(self) -> None:
        """Until all of them are started, or have failed."""
        told = await self._line(_READY_S)
        self.ready, self.failed = told["ready"], told["failed"]

    async def cell_s(self, way: str) -> float:
        """Seconds that one cell took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way}\n".encode())
        told = await self._line(_CELL_S)
        assert str(told["printed"]).isdigit(), told
        return float(told["took_s"])

    async def _line(self, within_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(within_s):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peers' process ended")
        told: dict[str, Any] = json.loads(line)
        return told


@asynccontextmanager
async def peers(python: Path, image: str, contexts: list[Path], work_dir: Path) -> AsyncIterator[Peers]:
    """The peers, started; stopped after the block."""
    process = await asyncio.create_subprocess_exec(
        python,
        Path(__file__).with_name("peer_cells.py"),
        image,
        *contexts,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=work_dir,
        env={**os.environ, "RLM_DOCKER_WORKSPACE_DIR": str(work_dir / "rlms")},
    )
    try:
        started = Peers(process)
        await started.wait_ready()
        yield started
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def installed_peers() -> Path:
    """The Python that has them; installs them once. Blocks."""
    place = _PLACE / hashlib.sha256(" ".join(PEERS).encode()).hexdigest()[:12]
    python = place / "bin" / "python"
    if not (place / ".installed").exists():
        print(f"peers: installing {', '.join(PEERS)} into {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, *_PIP_INSTALL, *PEERS], check=True)
        (place / ".installed").touch()
    return python.absolute()


def peers_image(client: docker.DockerClient) -> str:
    """The image they run in; built once. Blocks."""
    recipe = sandbox_image.sources()["bootstrap-base"]
    base = f"{sandbox_image.BASE_REPOSITORY}:{hashlib.sha256(recipe).hexdigest()[:12]}"
    dockerfile = _DOCKERFILE.format(base=base)
    version = hashlib.sha256((dockerfile + " ".join(_IN_THEIR_IMAGE)).encode()).hexdigest()[:12]
    tag = f"rlm-bench-peers:{version}"
    try:
        client.images.get(tag)
    except ImageNotFound:
        print(f"peers: building {tag}", flush=True)
        with tempfile.TemporaryDirectory(prefix="rlm-peers-") as folder:
            install = [sys.executable, *_PIP_INSTALL, "--only-binary=:all:", "--python-version=3.11"]
            subprocess.run([*install, f"--target={folder}/packages", *_IN_THEIR_IMAGE], check=True)
            Path(folder, "Dockerfile").write_text(dockerfile)
            client.images.build(path=folder, tag=tag, network_mode="none", rm=True)
    return tag


@contextmanager
def default_bridge(client: docker.DockerClient) -> Iterator[None]:
    """The interface of the engine's default network, for the length of the block, if it has gone.

    `rlms` starts its containers on that network and has no way to name another.
    """
    network = client.networks.get("bridge").attrs
    name = network["Options"]["com.docker.network.bridge.name"]
    if Path("/sys/class/net", name).exists():
        yield
        return
    pool = network["IPAM"]["Config"][0]
    address = f"{pool['Gateway']}/{pool['Subnet'].partition('/')[2]}"
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("address", "add", address, "dev", name)
        _ip("link", "set", name, "up")
        yield
    finally:
        # An engine that is started beside this one without a bridge has removed it.
        if Path("/sys/class/net", name).exists():
            _ip("link", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)  # noqa: S607 - where it lies differs


async def measure(python: Path, image: str) -> dict[str, object]:
    """Milliseconds of each way, and how many times ours goes into each of the peers'."""
    took_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rlm") as folder:
        work_dir = Path(folder)
        settings = Settings(state_dir=work_dir / "state")
        contexts = []
        for name, size_bytes in _CONTEXTS.items():
            contexts.append(work_dir / f"{name}.txt")
            contexts[-1].write_bytes(b"x" * size_bytes)
        async with AsyncExitStack() as stack:
            ours = {
                f"ours, {name}": await stack.enter_async_context(
                    our_sandbox(settings, "runc", context_bytes=size_bytes)
                )
                for name, size_bytes in _CONTEXTS.items()
            }
            theirs = await stack.enter_async_context(peers(python, image, contexts, work_dir))
            for turn in range(_TURNS + 1):
                for way in theirs.ready:
                    took_s.setdefault(way, []).append(await theirs.cell_s(way))
                for way, step in ours.items():
                    took_s.setdefault(way, []).extend([await timed_s(step) for _ in range(_OURS_IN_A_TURN)])
                if turn == 0:
                    took_s.clear()  # warm-up
            failed = theirs.failed
    cell_ms = {way: spread_ms(times) for way, times in took_s.items()}
    times_faster = {
        way: round(row["p50"] / cell_ms[f"ours, {_context_of(way)}"]["p50"], 1)
        for way, row in cell_ms.items()
        if not way.startswith("ours")
    }
    return {
        "aims": [
            at_least(f"cell, ours against {way} context", faster, _AIM, "× faster")
            for way, faster in times_faster.items()
        ],
        "peers": PEERS,
        "cell_ms": cell_ms,
        "times_faster": times_faster,
        "failed": failed,
        "bars": [
            {
                "title": "One trivial cell, median",
                "unit": "ms",
                "log": True,
                "rows": {way: row["p50"] for way, row in cell_ms.items()},
            }
        ],
    }


def _context_of(way: str) -> str:
    return way.rpartition(", ")[2]


def main() -> None:
    """Print the medians and keep all of it."""
    client = connect_engine()
    python, image = installed_peers(), peers_image(client)
    with default_bridge(client):
        measured = asyncio.run(measure(python, image))
    client.close()
    for what in ("cell_ms", "times_faster", "failed"):
        print(f"{what}: {json.dumps(measured[what], indent=1)}")
    keep("peers", measured)


if __name__ == "__main__":
    main()
