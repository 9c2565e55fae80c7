"""Whether the engine made the sandbox that was asked for: looked at after each start, in production too.

An engine that lacks something may leave a setting out, and say so in a warning that nobody reads; a default
of its daemon may have been changed since the last start. So what it reports of a container that has just
started is compared with what it was asked for, and the sandbox is refused when it differs. This compares
words of the engine; that the kernel keeps them is shown by the probes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.errors import EngineError
from orchestrator.sandbox.runtimes import GVISOR
from orchestrator.visible import visible_line

_MAX_WORD_CHARS = 160
_MAX_FAULTS = 5
_GVISOR_PROCESS = "runsc-sandbox"
_OPEN_DOORS = (
    "Privileged",
    "CapAdd",
    "Devices",
    "DeviceRequests",
    "DeviceCgroupRules",
    "Binds",
    "VolumesFrom",
    "GroupAdd",
    "PidMode",
    "UTSMode",
    "UsernsMode",
    "CgroupParent",
    "PortBindings",
    "PublishAllPorts",
    "Links",
    "ExtraHosts",
    "OomKillDisable",
)
"""Settings of `HostConfig` that we never give. An engine may leave them out; it may not fill them."""
_COVERED = ("MaskedPaths", "ReadonlyPaths")
"""Parts of /proc and /sys that the engine covers by itself. It must."""
_OF_A_LIMIT = re.compile(
    r"swap|memory|pids|cpu|cgroup|seccomp|capabilit|privileges|ulimit|read-?only", re.IGNORECASE
)


def check(
    asked: Mapping[str, object],
    created: object,
    inspected: object,
    *,
    runtime: str,
    proc: Path = Path("/proc"),
) -> None:
    """Refuse a sandbox that is not the one that was asked for.

    Args:
        asked: The body of `POST /containers/create`.
        created: The engine's answer to it.
        inspected: Its answer to `GET /containers/{id}/json` after the start.
        runtime: The OCI runtime that was asked for.
        proc: Where this host shows its processes.

    Raises:
        EngineError: It differs. The sentence says in what.
    """
    found = [*warnings(created), *differences(asked, inspected)]
    if runtime == GVISOR:
        found += _other_than_gvisor(inspected, proc)
    if found:
        more = f" and {len(found) - _MAX_FAULTS} more" if len(found) > _MAX_FAULTS else ""
        raise EngineError(
            "the container engine made another sandbox than it was asked for: "
            f"{'; '.join(found[:_MAX_FAULTS])}{more}. `rlm doctor` says what the engine lacks"
        )


def warnings(created: object) -> Iterator[str]:
    """Warnings in the answer to a creation that tell of a part of the wall left out."""
    told = created.get("Warnings") if isinstance(created, Mapping) else None
    for warning in told if isinstance(told, list) else ():
        if isinstance(warning, str) and _OF_A_LIMIT.search(warning):
            yield f"it warns {visible_line(warning, _MAX_WORD_CHARS)!r}"


def differences(asked: Mapping[str, object], inspected: object) -> Iterator[str]:
    """In what a container differs from what was asked for, in the order of the asking."""
    seen = inspected if isinstance(inspected, Mapping) else {}
    config, host_config = seen.get("Config"), seen.get("HostConfig")
    if not isinstance(config, Mapping) or not isinstance(host_config, Mapping):
        yield "it does not describe its container"
        return
    for name, wanted in asked.items():
        if name == "HostConfig":
            continue
        if not _agrees(wanted, config.get(name)):
            yield _difference(name, wanted, config.get(name))
    limits = asked.get("HostConfig")
    for name, wanted in (limits if isinstance(limits, Mapping) else {}).items():
        if not _agrees(wanted, host_config.get(name)):
            yield _difference(name, wanted, host_config.get(name))
    for name in _OPEN_DOORS:
        if host_config.get(name):
            yield _difference(name, None, host_config[name])
    for name in _COVERED:
        if not host_config.get(name):
            yield f"{name} is empty"


def _agrees(wanted: object, got: object) -> bool:
    """Whether an answer holds what was asked for. What an engine or the image adds is no difference here."""
    if isinstance(wanted, Mapping):
        return isinstance(got, Mapping) and all(_agrees(value, got.get(key)) for key, value in wanted.items())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if not isinstance(got, Sequence) or isinstance(got, str):
            return False
        return all(any(_agrees(one, other) for other in got) for one in wanted)
    # Engines leave out what is false, zero or empty.
    return type(wanted) is type(got) and wanted == got if wanted else not got


def _difference(name: str, wanted: object, got: object) -> str:
    shown = visible_line(repr(got), _MAX_WORD_CHARS)
    if isinstance(wanted, bool | int | str) and len(str(wanted)) < _MAX_WORD_CHARS:
        return f"{name} is {shown}, not {wanted!r}"
    return f"{name} is {shown}"


def _other_than_gvisor(inspected: object, proc: Path) -> Iterator[str]:
    """Whether the process behind a running container is gVisor's own.

    The engine's word for the runtime is its name in a configuration file, which may stand for any program.
    """
    state = inspected.get("State") if isinstance(inspected, Mapping) else None
    if not isinstance(state, Mapping) or state.get("Running") is not True:
        return
    pid = state.get("Pid")
    try:
        program = (proc / str(int(pid)) / "cmdline").read_bytes() if isinstance(pid, int) else b""
    except OSError:
        program = b""
    name = Path(program.partition(b"\0")[0].decode("utf-8", "replace")).name
    if name != _GVISOR_PROCESS:
        shown = visible_line(name, 40) or "nothing that this host can see"
        yield f"behind its runtime {GVISOR!r} runs {shown}, not {_GVISOR_PROCESS}"
