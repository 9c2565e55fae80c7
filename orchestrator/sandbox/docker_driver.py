"""`SandboxDriver` over a Docker engine.

Every engine call runs in a thread with a deadline, because docker-py blocks and a stuck runtime can hang even
an `inspect`. After the start of a container the engine is only ever asked to inspect, measure and remove it:
no exec, no attach, no logs, no copying.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import docker
from docker import APIClient, DockerClient
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException

from orchestrator.errors import EngineError, SandboxStartError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.limits import ENGINE_CALL_S, ENGINE_STARTS_AT_ONCE
from orchestrator.sandbox import recheck
from orchestrator.sandbox.port import Ending, SandboxSpec
from orchestrator.sandbox.posture import LABEL_INSTANCE, Resources, create_arguments
from orchestrator.shielding import run_shielded

T = TypeVar("T")

_THREADS = 16
_NAME_PREFIX = "rlm-"


def connect_engine() -> DockerClient:
    """A client of the engine that the environment names, or of the default one. Blocks.

    Raises:
        EngineError: None answers.
    """
    try:
        client = docker.from_env(version="auto", timeout=int(ENGINE_CALL_S))
        client.ping()
    except (DockerException, RequestException) as error:
        raise EngineError(
            "no container engine answers: start Docker, or run deploy/setup-host as root to install it"
        ) from error
    return client


class DockerDriver:
    """See `SandboxDriver`."""

    def __init__(
        self, client: APIClient, *, image_id: str, instance_id: InstanceId, resources: Resources
    ) -> None:
        self._client = client
        self._image_id = image_id
        self._instance_id = instance_id
        self._resources = resources
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="engine")
        self._starts = asyncio.Semaphore(ENGINE_STARTS_AT_ONCE)

    @property
    def image(self) -> str:
        """The image's id."""
        return self._image_id

    async def start(self, spec: SandboxSpec) -> None:
        """See `SandboxDriver.start`."""
        async with self._starts:
            # Shielded: a thread that is creating a container cannot be stopped, only waited for.
            await run_shielded(self._start(spec))

    async def _start(self, spec: SandboxSpec) -> None:
        body = create_arguments(spec, self._resources, image=self._image_id, instance_id=self._instance_id)
        name = _name(spec.sandbox_id)
        try:
            created = await self._ask(lambda: self._create(body, name))
            await self._ask(lambda: self._client.start(name))
            # 2 ms, in which the worker starts anyway.
            inspected = await self._ask(lambda: self._client.inspect_container(name))
            recheck.check(body, created, inspected, runtime=spec.runtime)
        except EngineError:
            await self.destroy(spec.sandbox_id)
            raise
        except APIError as error:
            await self.destroy(spec.sandbox_id)
            raise SandboxStartError(f"the engine could not start a sandbox: {error.explanation}") from error

    def _create(self, body: dict[str, object], name: str) -> object:
        # Not `create_container`: that one adds proxy settings of the user's Docker configuration, credentials
        # included, to the environment.
        return self._client.create_container_from_config(body, name)  # type: ignore[no-untyped-call]

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """See `SandboxDriver.destroy`."""
        try:
            await self._ask(lambda: self._client.remove_container(_name(sandbox_id), force=True, v=True))
        except NotFound:
            return
        except APIError as error:
            # 409: its removal is under way already, which is what we want.
            if error.status_code != 409:
                raise EngineError(f"the engine could not remove a sandbox: {error.explanation}") from error

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        """See `SandboxDriver.cpu_s`."""
        try:
            stats = await self._ask(
                lambda: self._client.stats(_name(sandbox_id), stream=False, one_shot=True)
            )
        except APIError:
            return 0.0
        return float(stats["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        """See `SandboxDriver.ending`."""
        try:
            state = (await self._ask(lambda: self._client.inspect_container(_name(sandbox_id))))["State"]
        except APIError:
            return Ending.GONE
        if state["Running"]:
            return Ending.RUNNING
        return Ending.OUT_OF_MEMORY if state["OOMKilled"] else Ending.EXITED

    async def aclose(self) -> None:
        """See `SandboxDriver.aclose`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def _ask(self, call: Callable[[], T]) -> T:
        """One engine call, off the event loop, under its deadline."""
        asked = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.wait_for(asked, ENGINE_CALL_S)
        except TimeoutError as error:
            raise EngineError(f"the container engine did not answer within {ENGINE_CALL_S:g} s") from error
        except APIError:
            # An answer, though docker-py counts it among the broken connections below.
            raise
        except RequestException as error:
            raise EngineError("the connection to the container engine broke") from error


def containers_by_instance(client: APIClient) -> dict[InstanceId, list[str]]:
    """The ids of all sandboxes on the engine, by the orchestrator instance that made them."""
    found: dict[InstanceId, list[str]] = {}
    containers: list[dict[str, Any]] = client.containers(all=True, filters={"label": LABEL_INSTANCE})
    for container in containers:
        found.setdefault(InstanceId(container["Labels"][LABEL_INSTANCE]), []).append(container["Id"])
    return found


def _name(sandbox_id: SandboxId) -> str:
    # By name and not by the id that create returns: so that a container can be removed whose creation was
    # never confirmed.
    return _NAME_PREFIX + sandbox_id
