import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from docker import APIClient
from docker.errors import APIError, NotFound
from requests.exceptions import ConnectionError as BrokenConnection

from orchestrator.errors import EngineError, SandboxStartError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.sandbox import docker_driver, recheck
from orchestrator.sandbox.docker_driver import DockerDriver, ending_of
from orchestrator.sandbox.port import Ending, Found, SandboxSpec
from orchestrator.sandbox.posture import Resources

SANDBOX = SandboxId("s1")
CONTAINER = "ab" * 32


class Response:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def refusal(status_code: int) -> APIError:
    kind = NotFound if status_code == 404 else APIError
    return kind("no", response=cast(Any, Response(status_code)), explanation="no")


class Client:
    """Answers what a driver may ask, and nothing else: any other method is an AttributeError."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self._answers: dict[str, Callable[..., Any]] = {
            "create_container_from_config": lambda body, name: {"Id": CONTAINER, "Warnings": []},
            "start": lambda name: None,
            "inspect_container": lambda name: {"Id": CONTAINER, "State": {"Pid": 0, "Running": True}},
            "remove_container": lambda name, **options: None,
            "stats": lambda name, **options: {"cpu_stats": {"cpu_usage": {"total_usage": 2_500_000_000}}},
            "containers": lambda **options: [],
            "close": lambda: None,
            **answers,
        }
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answer = self._answers.get(name)
        if answer is None:
            raise AttributeError(name)
        self.asked.append(name)
        return answer


def driver(client: Client) -> DockerDriver:
    return DockerDriver(
        cast(APIClient, client),
        image_id="sha256:abc",
        instance_id=InstanceId("i1"),
        resources=Resources(
            memory_bytes=1, cpus=1, pids=1, tmp_bytes=1, shm_bytes=1, open_files=1, file_size_bytes=1
        ),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recheck, "check", lambda *_, **__: None)
    for name, value_s in (("CALL", 1.0), ("LOOK", 1.0), ("REMOVE", 1.0), ("SLOW_START", 0.1)):
        monkeypatch.setattr(docker_driver, f"ENGINE_{name}_S", value_s)
    monkeypatch.setattr(docker_driver, "_LOOK_AGAIN_S", 0.05)


def spec(tmp_path: Path, sandbox_id: SandboxId = SANDBOX) -> SandboxSpec:
    return SandboxSpec(
        sandbox_id=sandbox_id,
        socket_dir=tmp_path,
        context_dir=tmp_path,
        uid=200_000,
        runtime="runc",
        record=tmp_path / "record",
    )


@pytest.mark.case("F07", "B08")
async def test_the_whole_life_of_a_sandbox_takes_these_calls_and_no_others(tmp_path: Path) -> None:
    client = Client()
    engine = driver(client)
    await engine.start(spec(tmp_path))
    assert (tmp_path / "record").read_text() == CONTAINER
    assert await engine.cpu_s(SANDBOX) == 2.5
    assert await engine.ending(SANDBOX) is Ending.RUNNING
    assert engine.counters(SANDBOX) == (None, None, None)
    assert await engine.found() == []
    await engine.destroy(SANDBOX)
    await engine.aclose()
    assert client.asked == [
        *("create_container_from_config", "start", "inspect_container"),
        *("stats", "inspect_container", "containers"),
        *("remove_container", "close"),
    ]


@pytest.mark.parametrize(
    ("running", "exit_code", "oom_killed", "ending"),
    [
        (True, 0, True, Ending.RUNNING),
        (False, 0, True, Ending.EXITED),
        (False, 1, False, Ending.EXITED),
        (False, 137, True, Ending.OUT_OF_MEMORY),
        (False, 137, False, Ending.KILLED),
    ],
)
def test_the_engines_flag_counts_only_for_a_process_that_was_killed(
    running: bool, exit_code: int, oom_killed: bool, ending: Ending
) -> None:
    status = "running" if running else "exited"
    state = {"Status": status, "Running": running, "ExitCode": exit_code, "OOMKilled": oom_killed}
    assert ending_of(state) is ending


def test_a_container_that_somebody_is_removing_is_gone() -> None:
    """On a busy machine the engine takes seconds from killing it to forgetting it."""
    state = {"Status": "removing", "Running": False, "ExitCode": 137, "OOMKilled": False}
    assert ending_of(state) is Ending.GONE
    assert ending_of(state | {"Running": True, "ExitCode": 0, "Status": "running"}) is Ending.RUNNING


async def test_a_sandbox_that_the_engine_does_not_start_is_named(tmp_path: Path) -> None:
    def no(*_: object) -> None:
        raise refusal(400)

    with pytest.raises(SandboxStartError, match="could not start a sandbox: no"):
        await driver(Client(start=no)).start(spec(tmp_path))


@pytest.mark.case("F06")
async def test_starts_that_hang_give_their_places_to_others(tmp_path: Path) -> None:
    go_on = threading.Event()

    def start(name: str) -> None:
        if name.startswith("rlm-stuck"):
            go_on.wait(30)

    engine = driver(Client(start=start))
    stuck = [
        asyncio.create_task(engine.start(spec(tmp_path, SandboxId(f"stuck{number}")))) for number in range(12)
    ]
    try:
        async with asyncio.timeout(10):
            while sum(task.done() for task in stuck) < 4:
                await engine.start(spec(tmp_path, SandboxId("quick")))
                await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            await engine.start(spec(tmp_path))
    finally:
        go_on.set()
        await asyncio.gather(*stuck, return_exceptions=True)


async def test_a_removal_that_is_under_way_is_waited_for() -> None:
    answers = [refusal(409), refusal(500), refusal(409), refusal(404)]

    def remove(_name: str, **_options: object) -> None:
        raise answers.pop(0)

    await driver(Client(remove_container=remove)).destroy(SANDBOX)
    assert answers == []


@pytest.mark.case("F06")
async def test_a_removal_that_never_ends_is_not_taken_for_one_that_did() -> None:
    def remove(_name: str, **_options: object) -> None:
        raise refusal(409)

    with pytest.raises(EngineError, match="could not remove"):
        await driver(Client(remove_container=remove)).destroy(SANDBOX)


async def test_a_connection_that_breaks_is_the_engines_fault() -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenConnection

    engine = driver(Client(inspect_container=broken, containers=broken, remove_container=broken))
    for call in (engine.ending(SANDBOX), engine.found(), engine.destroy(SANDBOX)):
        with pytest.raises(EngineError, match="broke"):
            await call


async def test_what_is_not_there_is_gone() -> None:
    def missing(*_: object, **__: object) -> None:
        raise refusal(404)

    engine = driver(Client(inspect_container=missing, stats=missing, remove_container=missing))
    assert await engine.ending(SANDBOX) is Ending.GONE
    assert await engine.cpu_s(SANDBOX) == 0.0
    await engine.destroy(SANDBOX)


async def test_only_what_has_our_name_and_labels_is_a_sandbox() -> None:
    def container(name: str, **labels: str) -> dict[str, object]:
        return {"Names": [f"/{name}"], "Labels": {f"rlm.{key}": value for key, value in labels.items()}}

    listed = [
        container("rlm-s1", sandbox="s1", instance="i1", expires="1700000000", uid="200001"),
        container("rlm-s2", sandbox="s2", instance="i1"),
        container("rlm-s3", sandbox="s3", instance="i1", expires="soon", uid="-5"),
        container("somebody", sandbox="s4", instance="i1"),
        container("rlm-s5", sandbox="s5"),
    ]
    assert await driver(Client(containers=lambda **_: listed)).found() == [
        Found(SandboxId("s1"), InstanceId("i1"), 1_700_000_000, 200_001),
        Found(SandboxId("s2"), InstanceId("i1"), 0, 0),
        Found(SandboxId("s3"), InstanceId("i1"), 0, 0),
    ]
