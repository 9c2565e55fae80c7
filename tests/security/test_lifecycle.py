"""Nothing outlives what it was for: a sandbox ends with its run, its orchestrator, or the next one."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.limits import RunLimits
from orchestrator.sandbox.leftovers import leftovers
from orchestrator.sandbox.uids import HOST_DIRECTORY
from orchestrator.turn import Outcome
from tests.containers import containers_of, instances_in
from tests.security.engine_proxy import engine_proxy
from tests.security.house import House, open_house

_ROOT = Path(__file__).resolve().parents[2]
_GONE_WITHIN_S = 10.0
"""After the next start (F01)."""
RUNS = {"runc": 20, "runsc": 4}


@pytest.fixture
async def house(settings: Settings, engine: DockerClient, runtime: str) -> AsyncIterator[House]:
    async with open_house(settings, engine, runtime) as opened:
        yield opened


@contextmanager
def orchestrator(state_dir: Path, image: str, runtime: str, runs: int) -> Iterator[subprocess.Popen[str]]:
    """Another orchestrator in the middle of so many runs; killed after the block at the latest."""
    program = [sys.executable, "-m", "tests.security.many_runs", str(state_dir), image, runtime, str(runs)]
    with subprocess.Popen(program, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def running(engine: DockerClient, containers: list[str]) -> list[str]:
    return [
        container
        for container in containers
        if engine.api.inspect_container(container)["State"]["Status"] != "exited"
    ]


def marked_uids() -> set[str]:
    return {path.stem for path in HOST_DIRECTORY.glob("*.uid")} if os.geteuid() == 0 else set()


def mounts_of(state_dir: Path, containers: list[str]) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(state_dir) in line or any(one in line for one in containers)]


def sockets_in(state_dir: Path) -> list[Path]:
    return [path for path in state_dir.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]


async def until(what: str, is_so: object, *, within_s: float) -> None:
    assert callable(is_so)
    give_up_s = time.monotonic() + within_s
    while not await asyncio.to_thread(is_so):
        assert time.monotonic() < give_up_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.1)


# --- A killed orchestrator --------------------------------------------------------------------------------


@pytest.mark.case("F01", "A04")
@pytest.mark.alone
async def test_of_an_orchestrator_killed_in_the_middle_of_its_runs_nothing_is_left_after_the_next_start(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    state_dir = settings.state_dir
    with orchestrator(state_dir, settings.image, runtime, RUNS[runtime]) as killed:
        containers = containers_of(engine, state_dir)
        assert len(containers) == RUNS[runtime] * 3 // 2
        uids = {user_of(engine, container).partition(":")[0] for container in containers}
        if os.geteuid() == 0:
            assert len(uids & marked_uids()) == len(containers)
        assert sockets_in(state_dir)
        assert len(list(leftovers(containers))) >= len(containers), "else nothing is shown below"
        killed.kill()
        killed.wait()
    # Their workers end by themselves when their stream is gone.
    await until("the guests end", lambda: not running(engine, containers), within_s=30)

    started_s = time.monotonic()
    async with open_house(settings, engine, runtime) as following:
        own = {
            following.workplace.instance.instance_id,
            f"{following.workplace.instance.instance_id}.lock",
        }

        def nothing_is_left() -> bool:
            return (
                not containers_of(engine, state_dir)
                and {path.name for path in instances_in(state_dir)} <= own
                and not list(leftovers(containers))
                and not mounts_of(state_dir, containers)
                and not sockets_in(state_dir)
                and not uids & marked_uids()
            )

        await until("nothing is left", nothing_is_left, within_s=_GONE_WITHIN_S)
        print(
            f"{len(containers)} sandboxes on {runtime} gone {time.monotonic() - started_s:.1f} s after start"
        )
        assert (await following.cells("FINAL('on we go')")).end.answer == "on we go"


@pytest.mark.case("F01", "A04")
async def test_the_living_and_the_foreign_are_let_be(
    settings: Settings, engine: DockerClient, runtime: str, image_id: str
) -> None:
    """Orchestrators in the same state directory and elsewhere, and what only looks like a sandbox of ours."""
    foreign = [
        engine.api.create_container(image_id, labels=labels, name=name, use_config_proxy=False)["Id"]
        for name, labels in (
            (f"rlm-sforeign{os.getpid()}", {}),
            (f"rlm-sunknown{os.getpid()}", label(f"sunknown{os.getpid()}", expires_s=60)),
            (f"rlm-snever{os.getpid()}", label(f"snever{os.getpid()}", expires_s=None)),
        )
    ]
    expired = engine.api.create_container(
        image_id,
        name=f"rlm-sexpired{os.getpid()}",
        labels=label(f"sexpired{os.getpid()}", expires_s=-60),
        use_config_proxy=False,
    )["Id"]
    try:
        with tempfile.TemporaryDirectory(prefix="rlm", dir="/tmp") as elsewhere:
            with (
                orchestrator(settings.state_dir, settings.image, runtime, 1),
                orchestrator(Path(elsewhere), settings.image, runtime, 1),
            ):
                theirs = [*containers_of(engine, settings.state_dir), *containers_of(engine, Path(elsewhere))]
                assert len(theirs) == 2
                async with open_house(settings, engine, runtime) as house, house.sandbox() as inmate:
                    assert sorted(running(engine, theirs)) == sorted(theirs)
                    assert all(engine.api.inspect_container(container) for container in foreign)
                    assert not engine.api.containers(all=True, filters={"id": expired})
                    if os.geteuid() == 0:
                        uids = {user_of(engine, container) for container in theirs}
                        uids.add(user_of(engine, inmate.container["Id"]))
                        assert len(uids) == 3
            async with open_house(settings, engine, runtime):
                pass
            async with open_house(Settings(state_dir=Path(elsewhere), image=settings.image), engine, runtime):
                assert containers_of(engine, Path(elsewhere)) == []
    finally:
        for container in (*foreign, *theirs):
            engine.api.remove_container(container, force=True) if engine.api.containers(
                all=True, filters={"id": container}
            ) else None


def label(sandbox_id: str, *, expires_s: int | None) -> dict[str, str]:
    expires = "0" if expires_s is None else str(int(time.time()) + expires_s)
    return {
        "rlm.instance": "i0000000000",
        "rlm.sandbox": sandbox_id,
        "rlm.expires": expires,
        "rlm.uid": "1000",
    }


def user_of(engine: DockerClient, container: str) -> str:
    return str(engine.api.inspect_container(container)["Config"]["User"])


# --- One sandbox after the other --------------------------------------------------------------------------


@pytest.mark.case("F03")
async def test_what_one_sandbox_leaves_no_other_finds(house: House) -> None:
    leave = (
        "import os, sys, builtins\n"
        "for place in ('/tmp', '/dev/shm', os.path.expanduser('~')):\n"
        "  open(place + '/left', 'w').write('here')\n"
        "os.environ['LEFT'] = 'here'; sys.modules['left'] = sys\n"
        "builtins.left = 'here'; globals()['left'] = 1\n"
        "print('done')"
    )
    look = (
        "import os, sys, builtins\n"
        "places = ('/tmp', '/dev/shm', '/var/tmp', '/run', '/home')\n"
        "found = [place for place in places if os.path.exists(place + '/left')]\n"
        "print(found, 'LEFT' in os.environ, 'left' in sys.modules, hasattr(builtins, 'left'),"
        " 'left' in globals())"
    )
    async with house.sandbox() as first:
        await first.says(leave)
        # What the look would say if there were something to see.
        assert await first.says(look) == "['/tmp', '/dev/shm'] True True True True"
    async with house.sandbox() as second:
        assert await second.says(look) == "[] False False False False"
    assert first.container["Id"] != second.container["Id"]
    assert first.leased.sandbox_id != second.leased.sandbox_id


@pytest.mark.case("F04")
async def test_siblings_share_no_randomness(house: House) -> None:
    draw = (
        "import os, random, secrets, tempfile, uuid\n"
        "print(os.urandom(8).hex(), random.random(), secrets.token_hex(8), uuid.uuid4(), uuid.uuid1(),"
        " hash('x'), next(tempfile._get_candidate_names()), sep='\\n')"
    )
    async with house.sandbox() as one, house.sandbox() as other:
        both = [(await inmate.says(draw)).splitlines() for inmate in (one, other)]
        assert all(mine != others for mine, others in zip(*both, strict=True))
        again = [await inmate.says("import random; print(random.random())") for inmate in (one, other)]
        assert again[0] != again[1]


@pytest.mark.case("F06")
async def test_a_frozen_sandbox_is_removed_like_any_other(house: House) -> None:
    async with house.sandbox() as inmate:
        await asyncio.to_thread(house.engine.api.pause, inmate.container["Id"])
    assert containers_of(house.engine, house.settings.state_dir) == []
    assert not house.workplace.instance.leaked


@pytest.mark.case("F06", "F02")
async def test_a_run_cancelled_at_any_moment_leaves_no_sandbox(house: House) -> None:
    for delay_s in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        run = asyncio.create_task(house.cells("import time; time.sleep(60)", limits=RunLimits(max_depth=0)))
        await asyncio.sleep(delay_s)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert not house.workplace.instance.alive
        assert not house.workplace.instance.leaked
    assert containers_of(house.engine, house.settings.state_dir) == []


@pytest.mark.case("F07", "B08")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_after_a_start_the_engine_is_asked_to_look_and_to_remove_and_nothing_else(
    settings: Settings, engine: DockerClient, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_proxy(tmp_path) as proxy:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{proxy.socket}")
        async with open_house(settings, engine, runtime) as house:
            story = await house.cells(
                "import os; os._exit(1)", "while True: pass", "FINAL(1)", limits=RunLimits(cell_timeout_s=1)
            )
            assert story.end.outcome is Outcome.ANSWERED
    about = [
        (asked.method, asked.path.split("?")[0].rpartition("/")[2]) for asked in proxy.asked if asked.sandbox
    ]
    sandbox_id = next(asked.sandbox for asked in proxy.asked if asked.sandbox)
    assert set(about) <= {
        ("POST", "create"),
        ("POST", "start"),
        ("GET", "json"),
        ("GET", "stats"),
        ("DELETE", f"rlm-{sandbox_id}"),
    }
    assert about.index(("POST", "start")) < len(about) - 1


# --- The client goes away ---------------------------------------------------------------------------------


@contextmanager
def command(settings: Settings, tmp_path: Path, cell: str) -> Iterator[subprocess.Popen[bytes]]:
    """`rlm run` in the middle of that cell."""
    script, context = tmp_path / "script.py", tmp_path / "context.txt"
    script.write_text(f"def run(question, depth):\n    yield {cell!r}\n    return 'over'\n")
    context.write_text("nothing to see")
    arguments = ["run", "What?", "--context", str(context), "--model", f"scripted:{script}"]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "RLM_STATE_DIR": str(settings.state_dir),
        "RLM_IMAGE": settings.image,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.case("F02")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
async def test_a_terminal_that_closes_takes_the_run_and_its_sandbox_with_it(
    settings: Settings, engine: DockerClient, tmp_path: Path, number: signal.Signals
) -> None:
    with command(settings, tmp_path, "import time; time.sleep(600)") as process:
        await until(
            "a sandbox runs",
            lambda: running(engine, containers_of(engine, settings.state_dir)) or process.poll() is not None,
            within_s=60,
        )
        assert process.poll() is None
        process.send_signal(number)
        await asyncio.to_thread(process.wait, 30)
    assert containers_of(engine, settings.state_dir) == []
    assert instances_in(settings.state_dir) == []


@pytest.mark.case("F02")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_reader_that_goes_away_leaves_no_sandbox(
    settings: Settings, engine: DockerClient, tmp_path: Path, stream: str
) -> None:
    with command(settings, tmp_path, "import time; time.sleep(3)") as process:
        getattr(process, stream).close()
        await asyncio.to_thread(process.wait, 60)
    assert containers_of(engine, settings.state_dir) == []
    assert instances_in(settings.state_dir) == []
