import gzip
from pathlib import Path

import pytest

from orchestrator.sandbox import host_facts
from orchestrator.sandbox.host_facts import kernel_version, read_host_facts, with_mended
from orchestrator.sandbox.known_bad import Component, open_holes, table

pytestmark = pytest.mark.case("A16")

CHANGELOG = """runc (1.1.5+ds1-1+deb12u1) bookworm-security; urgency=high

  * Team upload.
  * CVE-2024-21626: several container breakouts due to internally leaked fds

 -- Somebody <somebody@example.org>  Fri, 02 Feb 2024 21:53:05 +0800
"""


def doc(tmp_path: Path, package: str, text: str) -> Path:
    (tmp_path / package).mkdir()
    (tmp_path / package / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def holes_of(component: Component) -> set[str]:
    return {cve for hole in open_holes(component, table()) for cve in hole.cves}


def test_the_changelog_of_the_package_says_which_holes_are_mended(tmp_path: Path) -> None:
    debian = Component(name="runc", version="1.1.5+ds1-1+deb12u1")
    assert "CVE-2024-21626" in holes_of(debian)
    judged = with_mended(debian, table(), doc(tmp_path, "runc", CHANGELOG))
    assert holes_of(judged) == {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}


@pytest.mark.parametrize("reported", ["1.1.5+ds1-1", "1.1.5", "1.1.5+ds1"])
def test_a_shorter_version_of_the_same_package_is_believed(tmp_path: Path, reported: str) -> None:
    judged = with_mended(Component(name="runc", version=reported), table(), doc(tmp_path, "runc", CHANGELOG))
    assert "CVE-2024-21626" not in holes_of(judged)


@pytest.mark.parametrize("reported", ["1.1.5+ds1-1+deb12u2", "1.1.4", "1.1", "", "v1.1.5-0-gf19387a6"])
def test_the_changelog_of_another_package_is_not(tmp_path: Path, reported: str) -> None:
    judged = with_mended(Component(name="runc", version=reported), table(), doc(tmp_path, "runc", CHANGELOG))
    assert not judged.mended


@pytest.mark.parametrize(
    "damaged",
    # The time of compression is part of the bytes, and these are part of a test's name.
    [b"", b"no gzip", gzip.compress(b"runc", mtime=0)[:-6], gzip.compress(b"\xff" * 99, mtime=0)],
)
def test_a_changelog_that_cannot_be_read_mends_nothing(tmp_path: Path, damaged: bytes) -> None:
    directory = doc(tmp_path, "runc", "")
    (directory / "runc" / "changelog.Debian.gz").write_bytes(damaged)
    component = Component(name="runc", version="1.1.5")
    assert with_mended(component, table(), directory) == component


def test_a_machine_without_changelogs_is_judged_by_its_numbers(tmp_path: Path) -> None:
    component = Component(name="runc", version="1.1.5")
    assert with_mended(component, table(), tmp_path) == component


@pytest.mark.parametrize(
    ("release", "version", "number"),
    [
        ("6.1.0-18-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)", "6.1.76"),
        ("5.15.0-105-generic", "#115-Ubuntu SMP Mon Apr 15 09:52:04 UTC 2024", ""),
        ("5.14.0-427.el9.x86_64", "#1 SMP PREEMPT_DYNAMIC", ""),
        ("6.1.90-99.173.amzn2023.x86_64", "#1 SMP", ""),
        ("6.12.8-200.fc41.x86_64", "#1 SMP PREEMPT_DYNAMIC", "6.12.8-200.fc41.x86_64"),
        ("6.18.44", "#1 SMP", "6.18.44"),
    ],
)
def test_the_number_of_a_kernel_counts_only_where_it_tells_what_was_mended(
    release: str, version: str, number: str
) -> None:
    assert kernel_version(release, version) == number


def test_gvisor_says_its_own_version(tmp_path: Path) -> None:
    program = tmp_path / "runsc"
    program.write_text("#!/bin/sh\necho 'runsc version release-20250512.0'\necho 'spec: 1.1.0'\n")
    program.chmod(0o755)
    components = read_host_facts((str(program), "--platform=systrap")).components
    assert Component(name="runsc", version="release-20250512.0") in components


@pytest.mark.parametrize("path", ["/bin/echo", "runsc", "../runsc", "/nonexistent/runsc", ""])
def test_no_other_program_is_started_on_an_engines_word(path: str) -> None:
    (found,) = [one for one in read_host_facts((path,)).components if one.name == "runsc"]
    assert found.version == ""


def test_a_gvisor_that_hangs_or_fails_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_facts, "_RUNSC_S", 0.1)
    program = tmp_path / "runsc"
    for script in ("sleep 60", "exit 3"):
        program.write_text(f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        (found,) = [one for one in read_host_facts((str(program),)).components if one.name == "runsc"]
        assert found.version == ""
