"""Containers as the engine alone makes them, of the image and posture of a sandbox, for comparison.

What they run is the least that a worker does: it loads gRPC.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import NotFound

from orchestrator.config import Settings
from orchestrator.ids import InstanceId, new_sandbox_id
from orchestrator.machine import image_id, resources
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import create_arguments

COMMAND = ["python3", "-c", "import grpc"]
UID = 65_532
_RUN_S = 60


@dataclass(frozen=True, slots=True)
class BareEngine:
    """Makes them, on threads of its own."""

    client: APIClient
    image: str
    settings: Settings
    runtime: str
    place: Path
    threads: ThreadPoolExecutor

    def body(self) -> dict[str, Any]:
        """What the engine is asked for."""
        spec = SandboxSpec(
            sandbox_id=new_sandbox_id(),
            socket_dir=self.place / "sock",
            context_dir=self.place / "ctx",
            uid=UID,
            runtime=self.runtime,
        )
        given = resources(self.settings.sandbox, self.runtime)
        body = create_arguments(spec, given, image=self.image, instance_id=InstanceId("bench"))
        return {**body, "Entrypoint": COMMAND}

    async def run(self) -> None:
        """Create, start, wait for its end; then remove."""
        await self._call(self._run_and_remove)

    async def run_to_exit(self) -> str:
        """Create, start, wait for its end. Gives its name, for `remove`."""
        name: str = await self._call(self._run)
        return name

    async def remove(self, name: str) -> None:
        """Remove one that has ended."""
        await self._call(self._remove, name)

    async def _call(self, work: Any, *arguments: str) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _run(self) -> str:
        name = f"rlm-bench-{new_sandbox_id()}"
        try:
            self.client.create_container_from_config(self.body(), name)  # type: ignore[no-untyped-call]
            self.client.start(name)
            ended = self.client.wait(name, timeout=_RUN_S)
            assert ended["StatusCode"] == 0, ended
        except BaseException:
            self._remove(name)
            raise
        return name

    def _remove(self, name: str) -> None:
        try:
            self.client.remove_container(name, force=True, v=True)
        except NotFound:
            return

    def _run_and_remove(self) -> None:
        self._remove(self._run())


@contextmanager
def bare_engine(settings: Settings, runtime: str, *, at_once: int) -> Iterator[BareEngine]:
    """For the length of the block; blocks while it looks for the image."""
    engine = connect_engine()
    with (
        tempfile.TemporaryDirectory(prefix="rlm") as folder,
        ThreadPoolExecutor(at_once, thread_name_prefix="bare engine") as threads,
    ):
        place = Path(folder)
        for name in ("sock", "ctx"):
            (place / name).mkdir()
            os.chown(place / name, -1, UID)
        place.chmod(0o711)
        yield BareEngine(engine.api, image_id(engine, settings), settings, runtime, place, threads)
    engine.close()
