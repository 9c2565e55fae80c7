"""What this host says about itself: a handful of small files, read once before sandboxes start. Blocks."""

import gzip
import platform
import re
import resource
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.sandbox.known_bad import Component, Hole, open_holes
from orchestrator.sandbox.preflight import HostFacts
from orchestrator.sandbox.runtimes import GVISOR

_PACKAGES = {"runc": "runc", "containerd": "containerd", "engine": "docker.io", "runsc": "runsc"}
"""Debian's, and Ubuntu's, by component."""
_DOC = Path("/usr/share/doc")
_RUNSC_S = 5.0
_MAX_CHANGELOG_BYTES = 2 * 1024 * 1024
_CVE = re.compile(r"CVE-\d{4}-\d{4,7}")
_AFTER_VERSION = ("", "-", "+", "~")
_NEWEST = re.compile(r"\S+ \(([^)\s]{1,100})\)")
_KERNEL_OF_DEBIAN = re.compile(r"\bDebian (\d+\.\d+\.\d+)-")
# Ubuntu's and Red Hat's kernels mend holes and keep the number that they started from.
_KERNEL_THAT_KEEPS_ITS_NUMBER = re.compile(r"\d+\.\d+\.0-\d|.*\.(el|amzn)\d")


def read_host_facts(runsc_command: Sequence[str] = ()) -> HostFacts:
    """The facts of this host. What cannot be read is left at its default.

    Args:
        runsc_command: How the engine starts gVisor, path first; empty when nobody asks for it.
    """
    return HostFacts(
        core_pattern=_line("/proc/sys/kernel/core_pattern"),
        same_page_merging=_line("/sys/kernel/mm/ksm/run") == "1",
        unprivileged_bpf=_line("/proc/sys/kernel/unprivileged_bpf_disabled") == "0",
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        components=(
            Component(name="kernel", version=kernel_version(platform.release(), platform.version())),
            *(Component(name=name, version=_installed(name)) for name in ("grpcio", "protobuf")),
            *((Component(name=GVISOR, version=_runsc_version(runsc_command[0])),) if runsc_command else ()),
        ),
    )


def kernel_version(release: str, version: str) -> str:
    """The number that says which fixes a kernel has, or nothing when its number does not say.

    Args:
        release: `uname -r`.
        version: `uname -v`, where Debian puts the release that its kernel is made from.
    """
    if debian := _KERNEL_OF_DEBIAN.search(version):
        return debian[1]
    return "" if _KERNEL_THAT_KEEPS_ITS_NUMBER.match(release) else release


def with_mended(component: Component, holes: tuple[Hole, ...], doc: Path = _DOC) -> Component:
    """The component, with the holes that its package's changelog says were mended.

    The changelog is read only when the number alone would condemn the version, and believed only when the
    package is the very one that reported the number.
    """
    package = _PACKAGES.get(component.name)
    if package is None or not open_holes(component, holes):
        return component
    text = _changelog(doc / package)
    newest = _NEWEST.match(text)
    if newest is None or not _same_package(component.version, newest[1]):
        return component
    return replace(component, mended=frozenset(_CVE.findall(text)))


def _same_package(reported: str, packaged: str) -> bool:
    """Whether a program that reports the one version can come from the package of the other."""
    return (
        bool(reported) and packaged.startswith(reported) and packaged[len(reported) :][:1] in _AFTER_VERSION
    )


def _changelog(directory: Path) -> str:
    try:
        with gzip.open(directory / "changelog.Debian.gz") as file:
            return file.read(_MAX_CHANGELOG_BYTES).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error):
        return ""


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _runsc_version(path: str) -> str:
    """The release of the gVisor at `path`; nothing when it does not say.

    The path is the engine's word, and only a program of that name is started for it.
    """
    if not path.startswith("/") or Path(path).name != GVISOR:
        return ""
    try:
        said = subprocess.run(  # noqa: S603 - no shell, and the name was looked at
            (path, "--version"), capture_output=True, timeout=_RUNSC_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout[:200].decode("utf-8", "replace").partition("\n")[0].removeprefix("runsc version ")


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
