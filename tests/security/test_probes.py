"""Every probe that is shipped, on both runtimes; all of them in one sandbox of each."""

import platform
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.probes import calls, kernel
from orchestrator.probes.finding import Probe, Verdict
from orchestrator.probes.sandbox import PROBES
from tests.security.probing import Probed

GOLDEN = Path(__file__).parent / "posture"

pytestmark = pytest.mark.timeout(180)  # the first test of a runtime waits for its sandbox


@pytest.mark.parametrize(
    "probe", [pytest.param(each, id=each.title, marks=pytest.mark.case(each.case)) for each in PROBES]
)
def test_the_door_is_closed(
    probe: Probe,
    runtime: str,
    probed: Callable[[str], Probed],
    record_property: Callable[[str, object], None],
) -> None:
    finding = probed(runtime).finding(probe)
    assert finding.ok, f"{finding.verdict.value}: {finding.detail}"
    if finding.verdict is Verdict.DIFFERS:
        record_property("difference", f"{finding.case} {finding.title}: {finding.detail}")
    assert runtime == "runsc" or finding.verdict is Verdict.CLOSED


def test_every_guest_file_is_read_by_a_probe() -> None:
    guest = {
        path.name.removesuffix(".py")
        for path in files("orchestrator.probes.guest").iterdir()
        if path.name.endswith(".py")
    }
    assert guest - {"__init__", "door"} == {probe.source for probe in PROBES}


@pytest.mark.case("A10")
@pytest.mark.parametrize("runtime", ["runc"])
def test_exactly_the_golden_system_calls_pass(runtime: str, probed: Callable[[str], Probed]) -> None:
    """The whole list, so that one that an honest cell needs isn't lost either."""
    machine = platform.machine()
    facts = probed(runtime).of("sweep")
    through = kernel.passed(facts, machine)
    golden = _golden(runtime)
    assert through - golden == set()
    # An older kernel lacks some. What the filter refuses it would refuse with EPERM.
    lacking = {calls.numbers(machine)[name] for name in golden - through}
    assert lacking <= set(facts["answers"]["ENOSYS"])


@pytest.mark.case("A10")
@pytest.mark.runsc
@pytest.mark.parametrize("runtime", ["runsc"])
def test_gvisor_answers_exactly_the_golden_system_calls(
    runtime: str, probed: Callable[[str], Probed], engine: DockerClient
) -> None:
    release = _runsc_release(engine)
    first_line = (GOLDEN / "golden_syscalls_runsc.txt").read_text().splitlines()[0]
    if release not in first_line:
        pytest.skip(f"the golden list is of {first_line}, not of {release}")
    assert kernel.passed(probed(runtime).of("sweep"), platform.machine()) == _golden(runtime)


@pytest.mark.case("C15")
@pytest.mark.runsc
@pytest.mark.parametrize("runtime", ["runsc"])
def test_gvisor_outlives_every_system_call_with_senseless_arguments(
    runtime: str, probed: Callable[[str], Probed]
) -> None:
    """Probes that come after the sweep ran in the same sandbox."""
    assert probed(runtime).of("sweep")["finished"]
    sources = list(probed(runtime).facts)
    assert sources.index("sweep") < len(sources) - 1
    assert probed(runtime).of(sources[-1])["ran"]


@pytest.mark.case("A10")
def test_the_golden_list_is_what_the_profile_allows() -> None:
    """So that neither changes alone. Two calls are let past every filter by the kernel itself."""
    known = calls.numbers("x86_64").keys()
    assert _golden("runc") - {"uretprobe", "uprobe"} == calls.allowed() & known - calls.LEFT_OUT.keys()


def _golden(runtime: str) -> set[str]:
    lines = (GOLDEN / f"golden_syscalls_{runtime}.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


def _runsc_release(engine: DockerClient) -> str:
    path = engine.info()["Runtimes"]["runsc"]["path"]
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    return said.split()[2]
