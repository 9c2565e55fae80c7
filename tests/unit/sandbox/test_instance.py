import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.errors import MachineError, SandboxStartError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.sandbox import instance as instances
from orchestrator.sandbox.instance import claim_instance, dead_instances, forget_instance

SANDBOX = SandboxId("s0")


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1_000)


@pytest.fixture
def few_uids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of two uids."""
    monkeypatch.setattr(instances, "_UIDS_PER_INSTANCE", 2)
    monkeypatch.setattr(instances, "_UID_BLOCKS", 2)


def left_in(state_dir: Path) -> list[str]:
    return sorted(path.name for path in (state_dir / "instances").iterdir())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- Living and dead --------------------------------------------------------------------------------------


def test_a_living_instance_is_not_taken_for_dead(tmp_path: Path) -> None:
    with claim_instance(tmp_path), claim_instance(tmp_path):
        assert dead_instances(tmp_path) == []


def test_an_instance_leaves_nothing_behind_and_no_file_open(tmp_path: Path) -> None:
    before = open_files()
    with claim_instance(tmp_path) as instance, instance.sandbox_directories(SANDBOX):
        pass
    assert left_in(tmp_path) == []
    assert open_files() == before


def test_an_instance_that_fails_inside_leaves_nothing_behind_either(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), claim_instance(tmp_path):
        raise OSError("mine")
    assert left_in(tmp_path) == []


def test_an_instance_whose_process_was_killed_is_dead_and_can_be_forgotten(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from orchestrator.sandbox.instance import claim_instance\n"
        "with claim_instance(Path(sys.argv[1])) as instance:\n"
        "    print(instance.instance_id, flush=True); os._exit(9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True
    )
    instance_id = InstanceId(killed.stdout.strip())
    with claim_instance(tmp_path) as living:
        assert dead_instances(tmp_path) == [instance_id]
        forget_instance(tmp_path, instance_id)
        assert dead_instances(tmp_path) == []
        assert left_in(tmp_path) == sorted([living.instance_id, f"{living.instance_id}.lock"])


def test_a_lock_file_has_its_name_only_once_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two somebody might look for dead instances, and would remove this one."""
    seen: list[InstanceId] = []
    flock = fcntl.flock

    def look_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        seen.extend(dead_instances(tmp_path))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", look_first)
    with claim_instance(tmp_path):
        assert seen == []
        assert dead_instances(tmp_path) == []


def test_forgetting_what_is_gone_is_harmless(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance:
        pass
    forget_instance(tmp_path, instance.instance_id)


def test_there_are_no_dead_instances_in_a_state_directory_never_used(tmp_path: Path) -> None:
    assert dead_instances(tmp_path / "never") == []


# --- Directories ------------------------------------------------------------------------------------------


def test_a_state_directory_is_private(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    with claim_instance(state_dir) as instance:
        for private in (
            state_dir,
            state_dir / "instances",
            instance.contexts_dir,
            instance.contexts_dir.parent,
        ):
            assert stat.S_IMODE(private.stat().st_mode) == 0o700, private


def test_a_state_directory_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = open_files()
    with (
        pytest.raises(MachineError, match=r"file/state.*RLM_STATE_DIR"),
        claim_instance(tmp_path / "file/state"),
    ):
        pass
    assert open_files() == before


def test_a_sandboxs_directories_are_gone_after_it(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance:
        with instance.sandbox_directories(SANDBOX) as (socket_dir, context_dir):
            (context_dir / "blob").touch()
            assert socket_dir.is_dir()
            assert socket_dir.parent == context_dir.parent
        assert not socket_dir.parent.exists()


# --- Uids -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
def test_who_is_not_root_gives_no_uids(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance, instance.guest_uid() as uid:
        assert uid is None


def uids(instance: instances.Instance, stack: ExitStack) -> Iterator[int | None]:
    while True:
        yield stack.enter_context(instance.guest_uid())


@pytest.mark.usefixtures("as_root")
def test_no_two_sandboxes_share_a_uid_across_all_instances(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as first, claim_instance(tmp_path) as second, ExitStack() as stack:
        given = [next(uids(instance, stack)) for _ in range(50) for instance in (first, second)]
    assert len(set(given)) == 100
    assert all(uid is not None and 200_000 <= uid < 1_200_000 for uid in given)


@pytest.mark.usefixtures("as_root")
def test_a_uid_is_not_used_again_soon(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance, ExitStack() as stack:
        with instance.guest_uid() as used:
            pass
        assert used not in [next(uids(instance, stack)) for _ in range(900)]


@pytest.mark.usefixtures("as_root", "few_uids")
def test_a_sandbox_for_which_no_uid_is_left_does_not_start(tmp_path: Path) -> None:
    with (
        claim_instance(tmp_path) as instance,
        instance.guest_uid(),
        instance.guest_uid(),
        pytest.raises(SandboxStartError, match="no uid left"),
        instance.guest_uid(),
    ):
        pass


@pytest.mark.usefixtures("as_root", "few_uids")
def test_an_instance_for_which_no_uids_are_left_does_not_start_and_leaves_nothing(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as first, claim_instance(tmp_path) as second:
        before, files = left_in(tmp_path), open_files()
        with pytest.raises(MachineError, match="too many"), claim_instance(tmp_path):
            pass
        assert left_in(tmp_path) == before
        assert open_files() == files
        assert first.instance_id != second.instance_id
    with claim_instance(tmp_path):
        pass
