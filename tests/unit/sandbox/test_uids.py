import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.errors import MachineError, SandboxStartError
from orchestrator.ids import SandboxId
from orchestrator.sandbox import uids
from orchestrator.sandbox.uids import claim_uids, is_guest_uid

SANDBOX = SandboxId("s0")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of two uids."""
    monkeypatch.setattr(uids, "_UIDS_PER_BLOCK", 2)
    monkeypatch.setattr(uids, "_BLOCKS", 2)


@pytest.mark.case("A04")
def test_no_two_sandboxes_share_a_uid_whoever_started_them(tmp_path: Path) -> None:
    with claim_uids(tmp_path) as first, claim_uids(tmp_path) as second:
        given = [of.take(SandboxId(f"s{number}")) for number in range(50) for of in (first, second)]
    assert len(set(given)) == 100
    assert all(is_guest_uid(uid) for uid in given)


@pytest.mark.case("A04")
def test_processes_with_other_state_directories_have_other_uids(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from orchestrator.sandbox.instance import claim_instance\n"
        "with claim_instance(Path(sys.argv[1]), uids_dir=Path(sys.argv[2])) as instance:\n"
        "    print(instance.begin('s1'), flush=True); sys.stdin.read()\n"
    )
    with ExitStack() as stack:
        given = set()
        for number in range(3):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(tmp_path / f"state{number}"), str(tmp_path / "uids")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert process.stdout is not None
            given.add(process.stdout.readline())
    assert len(given) == 3


@pytest.mark.case("F08")
def test_a_uid_is_not_used_again_soon(tmp_path: Path) -> None:
    with claim_uids(tmp_path) as given:
        used = given.take(SANDBOX)
        given.give_back(used)
        assert used not in [given.take(SandboxId(f"s{number}")) for number in range(900)]


@pytest.mark.usefixtures("few")
def test_a_sandbox_for_which_no_uid_is_left_does_not_start(tmp_path: Path) -> None:
    with claim_uids(tmp_path) as given:
        taken = [given.take(SandboxId(f"s{number}")) for number in range(2)]
        with pytest.raises(SandboxStartError, match="no uid left"):
            given.take(SANDBOX)
        given.give_back(taken[0])
        assert given.take(SANDBOX) == taken[0]


@pytest.mark.case("F08")
@pytest.mark.usefixtures("few")
def test_the_uid_of_a_sandbox_that_a_dead_process_left_is_in_quarantine_until_it_is_gone(
    tmp_path: Path,
) -> None:
    with claim_uids(tmp_path) as dead:
        left = dead.take(SANDBOX)
    with claim_uids(tmp_path) as given:
        other = given.take(SandboxId("s1"))
        assert other != left
        with pytest.raises(SandboxStartError):
            given.take(SandboxId("s2"))
        assert given.end_quarantine({SANDBOX, SandboxId("s1")}, ours=()) == 0
        # The engine does not know s1 yet; it is about to be made.
        assert given.end_quarantine(set(), ours={SandboxId("s1")}) == 1
        assert given.take(SandboxId("s2")) == left


@pytest.mark.case("F08")
def test_what_a_living_process_has_marked_is_its_own_business(tmp_path: Path) -> None:
    with claim_uids(tmp_path) as other, claim_uids(tmp_path) as given:
        uid = other.take(SANDBOX)
        assert given.end_quarantine(set(), ours=()) == 0
        assert given.has_living_owner(uid)
    with claim_uids(tmp_path), claim_uids(tmp_path) as third:
        assert third.has_living_owner(200_000)
        assert not third.has_living_owner(202_000)
        assert not third.has_living_owner(0)


@pytest.mark.usefixtures("few")
def test_there_are_only_so_many_blocks(tmp_path: Path) -> None:
    with (
        claim_uids(tmp_path),
        claim_uids(tmp_path),
        pytest.raises(MachineError, match="too many"),
        claim_uids(tmp_path),
    ):
        pass


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file/uids"), claim_uids(tmp_path / "file/uids"):
        pass
