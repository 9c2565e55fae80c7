from pathlib import Path

import pytest

from orchestrator.sandbox.cgroups import NOTHING_KNOWN, open_counters
from orchestrator.sandbox.port import Counters
from tests.open_files import nothing_left_open

ID = "c" * 64
V1_OOM = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
V2_EVENTS = "low 0\nhigh 0\nmax 21\noom 2\noom_kill {}\noom_group_kill 0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/7").mkdir(parents=True)
    return tmp_path / "proc"


def v1(tmp_path: Path, proc: Path) -> tuple[Path, Path]:
    (proc / "7/cgroup").write_text(f"8:pids:/docker/{ID}\n4:cpuacct,memory:/docker/{ID}\n0::/docker/{ID}\n")
    memory, pids = tmp_path / f"cg/memory/docker/{ID}", tmp_path / f"cg/pids/docker/{ID}"
    cpu = tmp_path / f"cg/cpuacct/docker/{ID}"
    for group in (memory, pids, cpu):
        group.mkdir(parents=True)
    (cpu / "cpuacct.usage").write_text("1500000000\n")
    return memory / "memory.oom_control", pids / "pids.events"


def v2(tmp_path: Path, proc: Path) -> tuple[Path, Path]:
    (proc / "7/cgroup").write_text(f"0::/system.slice/docker-{ID}.scope\n")
    group = tmp_path / f"cg/system.slice/docker-{ID}.scope"
    group.mkdir(parents=True)
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1000000\n")
    return group / "memory.events", group / "pids.events"


@pytest.mark.parametrize(("layout", "text"), [(v1, V1_OOM), (v2, V2_EVENTS)], ids=["v1", "v2"])
def test_counters_are_read_again_and_again_from_files_opened_once(
    tmp_path: Path,
    proc: Path,
    layout: object,
    text: str,
) -> None:
    assert callable(layout)
    memory, pids = layout(tmp_path, proc)
    memory.write_text(text.format(0))
    pids.write_text("max 0\n")
    with nothing_left_open():
        counters = open_counters(7, ID, root=tmp_path / "cg", proc=proc)
        assert counters.read() == Counters(oom_kills=0, refused_forks=0, cpu_s=1.5)
        memory.write_text(text.format(12))
        pids.write_text("max 3\n")
        assert counters.read() == Counters(oom_kills=12, refused_forks=3, cpu_s=1.5)
        counters.close()
        counters.close()
    assert counters.read() == NOTHING_KNOWN


def test_a_process_that_is_not_of_the_container_says_nothing_about_it(tmp_path: Path, proc: Path) -> None:
    """The engine may live beyond a pid namespace; its pids are other processes here."""
    memory, pids = v1(tmp_path, proc)
    memory.write_text(V1_OOM.format(5))
    pids.write_text("max 5\n")
    assert open_counters(7, "d" * 64, root=tmp_path / "cg", proc=proc).read() == NOTHING_KNOWN
    assert open_counters(8, ID, root=tmp_path / "cg", proc=proc).read() == NOTHING_KNOWN


def test_what_cannot_be_read_is_unknown_and_the_rest_is_not(tmp_path: Path, proc: Path) -> None:
    memory, pids = v1(tmp_path, proc)
    memory.write_text("oom_kill_disable 0\n")
    pids.write_text("max 2\n")
    counters = open_counters(7, ID, root=tmp_path / "cg", proc=proc)
    assert counters.read() == Counters(oom_kills=None, refused_forks=2, cpu_s=1.5)
    counters.close()
