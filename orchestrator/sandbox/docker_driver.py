"""`SandboxDriver` over a Docker engine.

After the start of a container the engine is only ever asked to inspect, measure, list and remove: no exec,
no attach, no logs, no copying. How its blocking calls are kept from blocking anybody else is in
`engine_calls.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import docker
from docker import APIClient, DockerClient
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException

from orchestrator.errors import EngineError, SandboxStartError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.limits import (
    ENGINE_CALL_S,
    ENGINE_CALLS_AT_ONCE,
    ENGINE_LAST_CALLS_S,
    ENGINE_LOOK_S,
    ENGINE_REMOVE_S,
    ENGINE_SLOW_START_S,
    ENGINE_STARTS_AT_ONCE,
)
from orchestrator.sandbox import recheck
from orchestrator.sandbox.cgroups import NOTHING_KNOWN, CgroupCounters, open_counters
from orchestrator.sandbox.engine_calls import EngineCalls
from orchestrator.sandbox.port import Counters, Ending, Found, SandboxSpec
from orchestrator.sandbox.posture import (
    LABEL_EXPIRES,
    LABEL_INSTANCE,
    LABEL_SANDBOX,
    LABEL_UID,
    Resources,
    create_arguments,
)
from orchestrator.shielding import run_shielded

T = TypeVar("T")

_NAME_PREFIX = "rlm-"
_LOOK_AGAIN_S = 0.2
_SIGKILLED = 137
"""What the engine calls the exit code of a process ended by SIGKILL."""


def connect_engine() -> DockerClient:
    """A client of the engine that the environment names, or of the default one. Blocks.

    Raises:
        EngineError: None answers.
    """
    try:
        client = docker.from_env(
            version="auto", timeout=int(ENGINE_CALL_S), max_pool_size=ENGINE_CALLS_AT_ONCE
        )
        client.ping()
    except (DockerException, RequestException) as error:
        raise EngineError(
            "no container engine answers: start Docker, or run deploy/setup-host as root to install it"
        ) from error
    return client


def ending_of(state: Mapping[str, Any]) -> Ending:
    """What the `State` of an inspected container says."""
    if state["Running"]:
        return Ending.RUNNING
    if state["Status"] == "removing":
        return Ending.GONE
    if state["ExitCode"] != _SIGKILLED:
        # Also with OOMKilled, which is set when the kernel took only a child of the worker.
        return Ending.EXITED
    return Ending.OUT_OF_MEMORY if state["OOMKilled"] else Ending.KILLED


class DockerDriver:
    """See `SandboxDriver`."""

    def __init__(
        self,
        client: APIClient,
        *,
        image_id: str,
        instance_id: InstanceId,
        resources: Resources,
        of_runtimes: Mapping[str, Resources] | None = None,
    ) -> None:
        """Makes sandboxes of one image.

        Args:
            client: Of the engine.
            image_id: Of the image.
            instance_id: Whose they are.
            resources: Of each sandbox ...
            of_runtimes: ... but of those on these runtimes.
        """
        self._client = client
        self._image_id = image_id
        self._instance_id = instance_id
        self._resources = resources
        self._of_runtimes = of_runtimes or {}
        self._calls = EngineCalls(ENGINE_CALLS_AT_ONCE)
        self._starts = asyncio.Semaphore(ENGINE_STARTS_AT_ONCE)
        self._counters: dict[SandboxId, CgroupCounters] = {}

    @property
    def image(self) -> str:
        """The image's id."""
        return self._image_id

    async def start(self, spec: SandboxSpec) -> None:
        """See `SandboxDriver.start`."""
        async with self._start_permit():
            # Shielded: a thread that is creating a container cannot be stopped, only waited for.
            await run_shielded(self._start(spec))

    @asynccontextmanager
    async def _start_permit(self) -> AsyncIterator[None]:
        """One of a few starts at once; a start that hangs is no competitor, and gives its place away."""
        await self._starts.acquire()
        slow = asyncio.get_running_loop().call_later(ENGINE_SLOW_START_S, self._starts.release)
        try:
            yield
        finally:
            if slow.when() > asyncio.get_running_loop().time():
                slow.cancel()
                self._starts.release()

    async def _start(self, spec: SandboxSpec) -> None:
        sandbox_id = spec.sandbox_id
        given = self._of_runtimes.get(spec.runtime, self._resources)
        body = create_arguments(spec, given, image=self._image_id, instance_id=self._instance_id)
        name = _name(sandbox_id)
        try:
            created = await self._ask(sandbox_id, lambda: self._create(body, name, spec), ENGINE_CALL_S)
            await self._ask(sandbox_id, lambda: self._client.start(name), ENGINE_CALL_S)
            # 2 ms, in which the worker starts anyway.
            inspected = await self._ask(
                sandbox_id, lambda: self._client.inspect_container(name), ENGINE_LOOK_S
            )
        except APIError as error:
            raise SandboxStartError(f"the engine could not start a sandbox: {error.explanation}") from error
        recheck.check(body, created, inspected, runtime=spec.runtime)
        self._counters[sandbox_id] = open_counters(inspected["State"]["Pid"], inspected["Id"])

    def _create(self, body: dict[str, object], name: str, spec: SandboxSpec) -> object:
        # Not `create_container`: that one adds proxy settings of the user's Docker configuration, credentials
        # included, to the environment.
        created = self._client.create_container_from_config(body, name)  # type: ignore[no-untyped-call]
        if spec.record is not None:
            spec.record.write_text(created["Id"], encoding="ascii")
        return created

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """See `SandboxDriver.destroy`."""
        counters = self._counters.pop(sandbox_id, None)
        if counters is not None:
            counters.close()
        name = _name(sandbox_id)
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + ENGINE_REMOVE_S
        while True:
            try:
                await self._ask(
                    sandbox_id,
                    lambda: self._client.remove_container(name, force=True, v=True),
                    give_up_s - loop.time(),
                )
            except NotFound:
                return
            except APIError as error:
                # 409: its removal is under way already, and is over when it isn't found. 500: what was killed
                # has yet to be gone (seen: "is zombie and can not be killed" of a frozen gVisor sandbox).
                again = error.status_code in {409, 500}
                if not again or loop.time() + 2 * _LOOK_AGAIN_S >= give_up_s:
                    raise EngineError(
                        f"the engine could not remove a sandbox: {error.explanation}"
                    ) from error
                await asyncio.sleep(_LOOK_AGAIN_S)
            else:
                return

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        """See `SandboxDriver.cpu_s`."""
        try:
            stats = await self._ask(
                sandbox_id,
                lambda: self._client.stats(_name(sandbox_id), stream=False, one_shot=True),
                ENGINE_LOOK_S,
            )
        except APIError:
            return 0.0
        return float(stats["cpu_stats"]["cpu_usage"]["total_usage"]) / 1e9

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        """See `SandboxDriver.ending`."""
        try:
            inspected = await self._ask(
                sandbox_id, lambda: self._client.inspect_container(_name(sandbox_id)), ENGINE_LOOK_S
            )
        except NotFound:
            return Ending.GONE
        except APIError as error:
            raise EngineError(f"the engine could not inspect a sandbox: {error.explanation}") from error
        return ending_of(inspected["State"])

    def counters(self, sandbox_id: SandboxId) -> Counters:
        """See `SandboxDriver.counters`."""
        counters = self._counters.get(sandbox_id)
        return NOTHING_KNOWN if counters is None else counters.read()

    async def found(self) -> Sequence[Found]:
        """See `SandboxDriver.found`."""
        try:
            containers = await self._ask(
                "all",
                lambda: self._client.containers(all=True, filters={"label": LABEL_SANDBOX}),
                ENGINE_LOOK_S,
            )
        except APIError as error:
            raise EngineError(f"the engine could not list sandboxes: {error.explanation}") from error
        return [found for container in containers if (found := _found(container)) is not None]

    async def look(self) -> None:
        """Whether the engine answers now.

        Raises:
            EngineError: It does not, or not in time.
        """
        try:
            await self._ask("engine", self._client.ping, ENGINE_LOOK_S)
        except APIError as error:
            raise EngineError(f"the container engine is not well: {error.explanation}") from error

    def hurry(self) -> None:
        """This process is to end: an engine that hangs must not keep it. What is left, the next one reaps."""
        self._calls.hurry(ENGINE_LAST_CALLS_S)

    async def aclose(self) -> None:
        """See `SandboxDriver.aclose`."""
        for counters in self._counters.values():
            counters.close()
        self._counters.clear()
        self._client.close()

    async def _ask(self, subject: str, call: Callable[[], T], within_s: float) -> T:
        """One engine call, off the event loop, under its deadline."""
        try:
            return await self._calls.ask(subject, call, within_s=within_s)
        except APIError:
            # An answer, though docker-py counts it among the broken connections below.
            raise
        except (DockerException, RequestException, OSError) as error:
            raise EngineError("the connection to the container engine broke") from error


def _found(container: Mapping[str, Any]) -> Found | None:
    """What the engine lists, unless it is not of our making: whoever may start containers may label them."""
    labels = container["Labels"]
    sandbox_id = labels[LABEL_SANDBOX]
    if f"/{_name(sandbox_id)}" not in container["Names"] or LABEL_INSTANCE not in labels:
        return None
    expires, uid = labels.get(LABEL_EXPIRES, ""), labels.get(LABEL_UID, "")
    return Found(
        sandbox_id=SandboxId(sandbox_id),
        instance_id=InstanceId(labels[LABEL_INSTANCE]),
        expires_at_s=int(expires) if expires.isdecimal() else 0,
        uid=int(uid) if uid.isdecimal() else 0,
    )


def _name(sandbox_id: SandboxId) -> str:
    # By name and not by the id that create returns: so that a container can be removed whose creation was
    # never confirmed.
    return _NAME_PREFIX + sandbox_id
