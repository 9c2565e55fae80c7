"""What an engine says about itself, read from its answers.

The answers are JSON of another program: whatever is missing or of another type counts as "no", never as
"yes". Pure; the words of an engine are made visible where they are shown.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.sandbox.known_bad import Component

_FLAGS = {"MemoryLimit", "SwapLimit", "PidsLimit", "CpuCfsQuota", "CpuCfsPeriod"}
_MAX_CHARS = 200
"""Of any word of the engine that is kept."""
_VERSION = re.compile(r"v?\d+\.\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """One engine, as it describes itself."""

    version: str
    system: str
    """`linux`, or nothing we can use."""
    kernel: str
    cgroup_version: str
    cgroup_driver: str
    controls: frozenset[str]
    """Of resources, by the names of the engine's `GET /info`: MemoryLimit, SwapLimit, PidsLimit, ..."""
    security: frozenset[str]
    """Names of its security options: seccomp, apparmor, selinux, rootless, userns, cgroupns."""
    runtimes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The OCI runtimes that it knows by name, path and arguments of each; whether they work is another
    matter."""
    components: Sequence[Component] = ()
    """The engine, containerd and runc, with what they call their versions."""


def read_facts(info: object, version: object) -> EngineFacts:
    """The facts in the answers to `GET /info` and `GET /version` of the engine's API."""
    of_info, of_version = _mapping(info), _mapping(version)
    engine = _text(of_info.get("ServerVersion"))
    return EngineFacts(
        version=engine,
        system=_text(of_info.get("OSType")),
        kernel=_text(of_info.get("KernelVersion")),
        cgroup_version=_text(of_info.get("CgroupVersion")) or "1",  # engines before 20.10 know no other
        cgroup_driver=_text(of_info.get("CgroupDriver")),
        controls=frozenset(name for name in _FLAGS if of_info.get(name) is True),
        security=frozenset(_security_name(option) for option in _sequence(of_info.get("SecurityOptions"))),
        runtimes={
            _text(name): _command(_mapping(runtime))
            for name, runtime in _mapping(of_info.get("Runtimes")).items()
        },
        components=(
            Component(name="engine", version=engine),
            Component(name="containerd", version=_component(of_version, of_info, "containerd")),
            Component(name="runc", version=_component(of_version, of_info, "runc")),
        ),
    )


def _component(version: Mapping[str, object], info: Mapping[str, object], name: str) -> str:
    """A component's version. A distribution's engine gives its package's version as the commit."""
    for component in map(_mapping, _sequence(version.get("Components"))):
        if component.get("Name") == name:
            commit = _text(_mapping(component.get("Details")).get("GitCommit"))
            number = _text(component.get("Version"))
            return commit if number and commit.startswith(number) else number
    commit = _text(_mapping(info.get(f"{name.capitalize()}Commit")).get("ID"))
    return commit if _VERSION.match(commit) else ""


def _security_name(option: object) -> str:
    """`name=seccomp,profile=default` is how engines since 1.13 say `seccomp`."""
    first = _text(option).partition(",")[0]
    return first.removeprefix("name=")


def _command(runtime: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(_text(part) for part in (runtime.get("path"), *_sequence(runtime.get("runtimeArgs"))))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _text(value: object) -> str:
    return value[:_MAX_CHARS] if isinstance(value, str) else ""
