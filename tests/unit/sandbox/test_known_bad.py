from importlib.metadata import version as installed

import pytest

from orchestrator.sandbox.known_bad import (
    Component,
    Hole,
    is_bad,
    is_readable,
    open_holes,
    parsed,
    read_table,
    table,
)

pytestmark = pytest.mark.case("A16")


def hole(*fixed: str, since: str = "", release: int = 0) -> Hole:
    return Hole(
        component="runc",
        cves=("CVE-1",),
        fixed=fixed,
        since=since,
        release=release,
        what="a way out",
        source="somewhere",
    )


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("1.1.99", True),  # an older branch without a fix of its own
        ("1.2.7", True),
        ("1.2.8", False),
        ("1.2.10", False),
        ("1.3.2", True),
        ("v1.3.3-0-gd842d771", False),
        ("1.4.0-rc.2", True),
        ("1.4.0-rc.3", False),
        ("1.4.0", False),
        ("2.0.0", False),
        ("0.9", True),
    ],
)
def test_a_version_is_bad_below_the_fix_of_its_own_branch(version: str, bad: bool) -> None:
    assert is_bad(version, hole("1.2.8", "1.3.3", "1.4.0-rc.3")) is bad


def test_a_branch_between_two_mended_ones_is_bad() -> None:
    assert is_bad("5.30.1", hole("5.29.6", "6.33.5"))


def test_a_version_from_before_the_hole_is_good() -> None:
    assert not is_bad("5.4.1", hole("5.10.102", since="5.8"))
    assert is_bad("5.8", hole("5.10.102", since="5.8"))


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("release-20221219.0", True),
        ("0.0~20221219.0-2+b3", True),
        ("release-20250512.0", False),
        ("custom", False),
    ],
)
def test_releases_of_gvisor_are_dates(version: str, bad: bool) -> None:
    assert is_bad(version, hole(release=20230904)) is bad


@pytest.mark.parametrize("version", ["", "unknown", "deadbeef", "\x1b[31m", "9" * 400, "1." * 200])
def test_a_version_that_cannot_be_read_is_neither_good_nor_bad(version: str) -> None:
    assert not is_bad(version, hole("1.2.8")) or parsed(version) is not None
    assert is_readable(Component(name="runc", version=version)) is (parsed(version) is not None)


def test_a_hole_that_the_distribution_mended_is_none() -> None:
    patched = Component(name="runc", version="1.1.5", mended=frozenset({"CVE-1", "CVE-2"}))
    assert not open_holes(patched, [hole("1.2.8")])
    assert open_holes(Component(name="runc", version="1.1.5"), [hole("1.2.8")])


def test_a_hole_of_another_component_is_none_of_its_business() -> None:
    assert not open_holes(Component(name="containerd", version="1.1.5"), [hole("1.2.8")])


def test_the_table_that_we_ship_can_be_read_and_names_what_the_issue_asks_for() -> None:
    rows = table()
    assert {row.component for row in rows} == {
        "engine",
        "containerd",
        "runc",
        "runsc",
        "kernel",
        "grpcio",
        "protobuf",
    }
    for row in rows:
        assert row.what
        assert row.source
        assert row.cves or row.release
        assert all(parsed(fixed) for fixed in row.fixed)


@pytest.mark.case("N04")
@pytest.mark.parametrize("package", ["grpcio", "protobuf"])
def test_the_packages_that_read_what_guests_send_have_no_known_hole(package: str) -> None:
    assert not open_holes(Component(name=package, version=installed(package)), table())


def test_a_row_that_says_nothing_about_versions_is_refused() -> None:
    with pytest.raises(ValueError, match="needs either"):
        read_table('[[hole]]\ncomponent = "runc"\ncves = []\nwhat = "?"\nsource = "?"\n')
