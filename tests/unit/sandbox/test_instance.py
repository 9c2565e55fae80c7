import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from orchestrator.errors import MachineError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.sandbox import uids
from orchestrator.sandbox.instance import (
    Instance,
    claim_instance,
    containers_of,
    dead_instances,
    forget_instance,
    forget_unborn,
    living_instances,
)
from tests.open_files import nothing_left_open

SANDBOX = SandboxId("s0")


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1_000)


Claim = Callable[[], AbstractContextManager[Instance]]


@pytest.fixture
def claim(tmp_path: Path) -> Claim:
    """Claims an instance whose uids are not the host's real ones."""
    return lambda: claim_instance(tmp_path, uids_dir=tmp_path / "uids")


def left_in(state_dir: Path) -> list[str]:
    return sorted(path.name for path in (state_dir / "instances").iterdir())


# --- Living and dead --------------------------------------------------------------------------------------


def test_a_living_instance_is_not_taken_for_dead(tmp_path: Path) -> None:
    with claim_instance(tmp_path), claim_instance(tmp_path):
        assert dead_instances(tmp_path) == []


def test_an_instance_leaves_nothing_behind_and_no_file_open(tmp_path: Path) -> None:
    with (
        nothing_left_open(),
        claim_instance(tmp_path) as instance,
        instance.sandbox_directories(SANDBOX),
    ):
        pass
    assert left_in(tmp_path) == []


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


def test_a_lock_file_that_never_got_its_name_goes_when_it_is_old(tmp_path: Path) -> None:
    with claim_instance(tmp_path):
        old, young = (tmp_path / "instances" / f"new-i{number}" for number in range(2))
        old.touch()
        young.touch()
        os.utime(old, (0, 0))
        forget_unborn(tmp_path)
        assert (old.exists(), young.exists()) == (False, True)


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
    with (
        nothing_left_open(),
        pytest.raises(MachineError, match=r"file/state.*RLM_STATE_DIR"),
        claim_instance(tmp_path / "file/state"),
    ):
        pass


def test_a_sandboxs_directories_are_gone_after_it(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance:
        with instance.sandbox_directories(SANDBOX) as (socket_dir, context_dir):
            (context_dir / "blob").touch()
            assert socket_dir.is_dir()
            assert socket_dir.parent == context_dir.parent
        assert not socket_dir.parent.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_guest_can_read_its_contexts_directory_whatever_this_process_keeps_private(
    tmp_path: Path, umask: int
) -> None:
    """A unit of systemd with UMask=0077 lost every sandbox under its first cell."""
    before = os.umask(umask)
    try:
        with claim_instance(tmp_path) as instance, instance.sandbox_directories(SANDBOX) as (_, context_dir):
            assert stat.S_IMODE(context_dir.stat().st_mode) == 0o755
    finally:
        os.umask(before)


# --- Sandboxes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_user")
def test_who_is_not_root_gives_no_uids(tmp_path: Path) -> None:
    with claim_instance(tmp_path) as instance:
        assert instance.begin(SANDBOX) is None
        instance.ended(SANDBOX, None)


@pytest.mark.usefixtures("as_root")
@pytest.mark.case("F08")
def test_a_sandbox_that_may_still_be_there_keeps_its_uid_and_its_record(claim: Claim) -> None:
    leaks: list[int] = []
    with claim() as instance:
        instance.on_leaks = leaks.append
        uid = instance.begin(SANDBOX)
        instance.record(SANDBOX).write_text("c0")
        instance.leak(SANDBOX, uid)
        assert (instance.alive, instance.leaked) == (set(), {SANDBOX: uid})
        others = {instance.begin(SandboxId(f"s{number}")) for number in range(1, 500)}
        assert uid not in others
        assert instance.containers([SANDBOX]) == ["c0"]
        instance.ended(SANDBOX, uid)
        assert instance.containers([SANDBOX]) == []
        assert leaks == [1, 0]


@pytest.mark.usefixtures("as_root")
@pytest.mark.case("F06")
def test_an_instance_that_ends_with_a_leaked_sandbox_leaves_what_the_next_one_needs_to_find_it(
    claim: Claim, tmp_path: Path
) -> None:
    with claim() as instance:
        uid = instance.begin(SANDBOX)
        instance.record(SANDBOX).write_text("c0")
        (instance.contexts_dir / "blob").touch()
        instance.leak(SANDBOX, uid)
    with claim() as following:
        assert dead_instances(tmp_path) == [instance.instance_id]
        assert living_instances(tmp_path, dead_instances(tmp_path)) == {following.instance_id}
        assert containers_of(tmp_path, instance.instance_id) == {SANDBOX: "c0"}
        assert not instance.contexts_dir.exists()


@pytest.mark.usefixtures("as_root")
def test_an_instance_for_which_no_uids_are_left_does_not_start_and_leaves_nothing(
    claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uids, "_BLOCKS", 2)
    with claim() as first, claim() as second:
        before = left_in(tmp_path)
        with nothing_left_open(), pytest.raises(MachineError, match="too many"), claim():
            pass
        assert left_in(tmp_path) == before
        assert first.instance_id != second.instance_id
    with claim():
        pass
