"""Group B: files and mounts."""

import re
from collections.abc import Iterator

from orchestrator.probes.container import SCRATCH
from orchestrator.probes.finding import Differs, Facts, Probe
from orchestrator.probes.host import Host
from orchestrator.sandbox.posture import TMP_FILES

_REFUSED = {"EROFS", "EACCES", "EPERM"}
_NOT_THERE = {"ENOTSUP", "ENOSYS"}
_MIB = 1024 * 1024
_FROM_THE_HOST = {"/context", "/run/rlm"}
_RANDOM_PATH = re.compile(r"/instances/i[0-9a-z]{10}/sandboxes/s[0-9a-z]{12}/(sock|ctx)$")
"""Ids of ours that name nobody. What is before them is the state directory."""


def _context(facts: Facts, host: Host) -> Iterator[str]:
    if done := {what: why for what, why in facts["context"].items() if why not in _REFUSED | _NOT_THERE}:
        yield f"the context: {done}"
    if host.context_changed:
        yield "the context's files are others than before"


def _root(facts: Facts, _host: Host) -> Iterator[str]:
    if extra := set(facts["created_in"]) - SCRATCH:
        yield f"files can be made in {sorted(extra)[:5]}"
    if facts["writable_files"]:
        yield f"can be changed: {facts['writable_files'][:5]}"


def _mounting(facts: Facts, _host: Host) -> Iterator[str]:
    for name in (
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "open_tree",
        "move_mount",
        "fsopen",
        "mount_setattr",
    ):
        if facts["calls"][name] not in {"EPERM", "ENOSYS"}:
            yield f"{name}: {facts['calls'][name]}"


def _host_paths(facts: Facts, host: Host) -> Iterator[str]:
    told = {mount["Destination"]: mount["Source"] for mount in host.inspected["Mounts"]}
    # gVisor shows its guest no more than that something is mounted.
    seen = {point: root for point, _, _, root in facts["mounts"] if point in told and root != "/"}
    if set(told) != _FROM_THE_HOST:
        yield f"directories of the host at {sorted(told)}"
    for point, source in (*told.items(), *seen.items()):
        if not _RANDOM_PATH.search(source):
            yield f"{point} comes from {source}"


def _bytes(facts: Facts, host: Host) -> Iterator[str]:
    for path, limit in (("/tmp", host.resources.tmp_bytes), ("/dev/shm", host.resources.shm_bytes)):  # noqa: S108
        why, mib = facts["bytes"][path]
        if why not in {"ENOSPC", "EFBIG"} or mib * _MIB > limit:
            yield f"{mib} MiB fitted into {path}, then {why}"
    if host.resources.tmp_bytes + host.resources.shm_bytes > host.resources.memory_bytes:
        yield "scratch is larger than memory"


def _inodes(facts: Facts, host: Host) -> Iterator[str | Differs]:
    why, made = facts["files"]
    if why == "ENOSPC" and made <= TMP_FILES:
        return
    if host.runtime == "runsc":
        # The limit is an option that releases of gVisor ignore.
        yield Differs(f"{made} files fitted: they are in the sandbox's own memory, which has a limit")
    else:
        yield f"{made} files fitted, then {why}"


def _programs(facts: Facts, _host: Host) -> Iterator[str]:
    for path, why in facts["program"].items():
        if why not in {"EACCES", "EPERM"}:
            yield f"a program in {path} runs: {why}"


def _held(facts: Facts, host: Host) -> Iterator[str]:
    why, mib = facts["held_open"]
    if why not in {"ENOSPC", "EFBIG"} or mib * _MIB > host.resources.tmp_bytes:
        yield f"{mib} MiB fitted into a file without a name, then {why}"


PROBES = (
    Probe("B01", "the context cannot be changed", "mounts", _context),
    Probe("B02", "the root file system cannot be changed", "mounts", _root),
    Probe("B03", "nothing can be mounted", "calls", _mounting),
    Probe("B09", "scratch ends at its size", "scratch", _bytes),
    Probe("B10", "scratch ends at its number of files", "scratch", _inodes),
    Probe("B11", "scratch runs no program", "scratch", _programs),
    Probe("B12", "a file without a name counts too", "scratch", _held),
    Probe("B16", "paths of the host are random", "mounts", _host_paths),
)
