"""Each flag of the posture removed in turn: a probe that would not notice is blind (N10)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from orchestrator.config import Settings
from orchestrator.probes.finding import Verdict
from orchestrator.probes.sandbox import PROBES
from tests.security.controls.weakened import (
    DOORS,
    FLAGS,
    NO_WALL,
    Control,
    canary_directory,
    doors_to,
    weakened,
)
from tests.security.posture.golden import GOLDEN
from tests.security.probing import probe

WAYS_TO_THE_HOST = doors_to(Path("/canary"))

WITHOUT_CONTROL = {
    "C05": "nobody can write a program that runs: the kernel says ETXTBSY, in any container",
    "D06": "without the filter, a kernel without vsock refuses it too",
}
"""Probes that no weaker sandbox shows to see, and why."""


def _case(control: Control) -> ParameterSet:
    marks = [pytest.mark.control(*control.opens)]
    return pytest.param(
        control, id=control.name, marks=[*marks, pytest.mark.runsc] if control.runtime == "runsc" else marks
    )


def _notices(control: Control, settings: Settings) -> None:
    probes = [each for each in PROBES if each.case in control.opens]
    assert {each.case for each in probes} == set(control.opens)
    with weakened(control.change):
        probed = probe(settings, control.runtime, probes)
    found = [probed.finding(each) for each in probes]
    saw = {each.case for each in found if each.verdict is Verdict.OPEN}
    assert saw == set(control.opens), found


@pytest.mark.case("N10")
@pytest.mark.parametrize("control", [_case(each) for each in (*FLAGS, *DOORS)])
def test_a_sandbox_that_is_weaker_is_noticed(control: Control, settings: Settings) -> None:
    _notices(control, settings)


@pytest.mark.case("N10")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.control(*c.opens)) for n, c in enumerate(WAYS_TO_THE_HOST)]
)
def test_a_way_to_the_hosts_files_is_noticed(number: int, settings: Settings) -> None:
    with canary_directory() as directory:
        _notices(doors_to(directory)[number], settings)


@pytest.mark.case("N10")
def test_every_entry_of_the_description_has_a_control_or_is_no_part_of_the_wall() -> None:
    removed = {entry for control in FLAGS for entry in control.removes}
    assert removed | NO_WALL.keys() == set(_entries())
    assert removed.isdisjoint(NO_WALL)


@pytest.mark.case("N10")
def test_every_probe_has_a_control_or_a_reason_for_none() -> None:
    seen = {case for control in (*FLAGS, *DOORS, *WAYS_TO_THE_HOST) for case in control.opens}
    assert {probe.case for probe in PROBES} == seen | WITHOUT_CONTROL.keys()
    assert seen.isdisjoint(WITHOUT_CONTROL)


def _entries() -> Iterator[str]:
    """Every entry of the golden description; of lists, what is in them."""
    yield from (name for name in GOLDEN if name != "HostConfig")
    for name, value in GOLDEN["HostConfig"].items():
        match name:
            case "SecurityOpt":
                parts = [option.replace(":", "=").partition("=")[0] for option in value]
            case "Tmpfs":
                options = value["/tmp"].split(",")
                parts = [each.partition("=")[0] for each in options if not each.startswith(("rw", "mode="))]
            case "Mounts":
                parts = [mount["Target"] for mount in value]
            case "Ulimits":
                parts = [limit["Name"] for limit in value]
            case _:
                parts = []
        yield from [f"HostConfig.{name} {part}" for part in parts] or [f"HostConfig.{name}"]
