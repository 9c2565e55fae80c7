"""Whether a machine may hold sandboxes: from what engine and host report to what speaks against it.

Rules. They live in this file and nowhere else:

1. A part of the wall that is missing refuses: seccomp; limits of memory, swap, processes and processor; a
   Linux engine; the runtime that was asked for, under exactly this name. No setting allows it anyway.
2. An engine that is asked over a network in the clear refuses: who listens is root on its machine.
3. A state directory that another user may change refuses.
4. A version with a known hole warns, or refuses where the settings say so. One whose number says nothing
   warns.
5. What weakens the wall without opening it warns, once, by name.
6. What is not known counts as missing.

Pure: no I/O, no clock.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.sandbox.engine_facts import EngineFacts
from orchestrator.sandbox.known_bad import Component, Hole, is_readable, open_holes
from orchestrator.sandbox.runtimes import RUNTIMES
from orchestrator.visible import visible_line

_MAX_WORD_CHARS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What this host says, besides its engine. Of a host that is not the engine's nothing is known."""

    core_pattern: str = ""
    """`/proc/sys/kernel/core_pattern`."""
    same_page_merging: bool = False
    """KSM runs: pages of one sandbox can be told from their timing in another."""
    unprivileged_bpf: bool = False
    open_files: int = 0
    """The most descriptors this process may have."""
    components: Sequence[Component] = ()
    """The kernel, runsc, grpcio and protobuf."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objection:
    """One thing that speaks against running sandboxes here."""

    name: str
    """Two or three words, stable: a program may look for it."""
    refuses: bool
    detail: str
    """What was found."""
    what_to_do: str
    danger: str = ""
    """What it would let happen."""

    @property
    def described(self) -> str:
        """Finding and danger."""
        return f"{self.detail}: {self.danger}" if self.danger else self.detail


_CONTROLS = {
    "MemoryLimit": (
        "memory limit",
        "a cell could use all memory of the host",
        "enable the kernel's memory controller (cgroup_enable=memory on its command line)",
    ),
    "SwapLimit": (
        "swap limit",
        "a cell past its memory limit would go on in the host's swap space",
        "enable swap accounting (swapaccount=1 on the kernel's command line)",
    ),
    "PidsLimit": (
        "pids limit",
        "a cell could fill the host's process table",
        "enable the kernel's pids controller, and delegate it to the engine if that is rootless",
    ),
    "CpuCfsQuota": (
        "cpu quota",
        "a cell could keep every processor busy",
        "use a kernel with CONFIG_CFS_BANDWIDTH, and delegate the controller if the engine is rootless",
    ),
    "CpuCfsPeriod": (
        "cpu period",
        "a cell could keep every processor busy",
        "use a kernel with CONFIG_CFS_BANDWIDTH, and delegate the controller if the engine is rootless",
    ),
}
_LEAST_OPEN_FILES = 4_096
"""A run tree of 16 sandboxes with 32 calls each needs about a thousand."""


def objections(
    engine: EngineFacts,
    host: HostFacts | None,
    *,
    holes: Iterable[Hole],
    refuse_known_bad: bool,
    runtime: str | None = None,
) -> tuple[Objection, ...]:
    """Everything that speaks against sandboxes on this engine, what refuses first.

    Args:
        engine: What the engine says of itself.
        host: What its host says; None when the engine is elsewhere.
        holes: The table of versions.
        refuse_known_bad: Whether a version with a known hole refuses, or warns.
        runtime: Judge the versions of what this one needs; None for those of all.
    """
    components = [
        component
        for component in (*engine.components, *(host.components if host else ()))
        if runtime is None or component.name == runtime or component.name not in RUNTIMES
    ]
    found = [
        *_of_engine(engine),
        *_of_versions(components, tuple(holes), refuse_known_bad),
        *_of_wall(engine),
        *(_of_host(host) if host else ()),
    ]
    return tuple(sorted(found, key=lambda objection: not objection.refuses))


def runtime_objection(runtime: str, engine: EngineFacts) -> Objection | None:
    """Whether the engine knows the runtime. There is no other that would do instead."""
    if runtime in engine.runtimes:
        return None
    known = ", ".join(sorted(name for name in engine.runtimes if "." not in name)) or "none"
    return Objection(
        name=f"runtime {runtime}",
        refuses=True,
        detail=visible_line(f"the engine has no runtime {runtime!r}; it has {known}", _MAX_WORD_CHARS),
        what_to_do="register it with the engine: deploy/setup-host does so where it is packaged,"
        " docs/runtimes.md says how elsewhere",
    )


def address_objection(address: str, *, verified_tls: bool) -> Objection | None:
    """Whether the engine may be asked at this address, `DOCKER_HOST`; empty for the default one."""
    scheme, _, _ = address.partition("://")
    if not address or verified_tls or scheme in {"unix", "http+unix", "npipe", "ssh"}:
        return None
    return Objection(
        name="engine address",
        refuses=True,
        detail=visible_line(
            f"{address!r} would be asked over a network without checking who answers", _MAX_WORD_CHARS
        ),
        what_to_do="name a Unix socket in DOCKER_HOST, or set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH",
    )


def state_dir_objection(path: str, *, mode: int, owner_uid: int, own_uid: int) -> Objection | None:
    """Whether the state directory is ours alone to change.

    Args:
        path: Of it, for the sentence.
        mode: Its permission bits.
        owner_uid: Whose it is.
        own_uid: Whose we are.
    """
    if owner_uid not in {own_uid, 0}:
        fault = f"belongs to uid {owner_uid}"
    elif mode & 0o022:
        fault = "can be changed by other users"
    else:
        return None
    return Objection(
        name="state directory",
        refuses=True,
        detail=visible_line(f"{path} {fault}, who could put their own in place of sockets and contexts", 400),
        what_to_do="chmod 700 it, chown it to this user, or set RLM_STATE_DIR to a directory of its own",
    )


def sentence(refusing: Iterable[Objection]) -> str:
    """One sentence for each objection: what is wrong, and what to do."""
    return "; ".join(f"{one.name}: {one.described} ({one.what_to_do})" for one in refusing)


def _of_engine(engine: EngineFacts) -> Iterator[Objection]:
    if engine.system != "linux":
        yield Objection(
            name="engine system",
            refuses=True,
            detail=f"its containers are for {visible_line(engine.system, 40) or 'no known system'}",
            what_to_do="use an engine with Linux containers",
        )
    if "seccomp" not in engine.security:
        yield Objection(
            name="seccomp",
            refuses=True,
            detail="the engine cannot filter system calls",
            danger="a cell would have all of the kernel before it",
            what_to_do="use a kernel with CONFIG_SECCOMP_FILTER and an engine built with seccomp",
        )
    for control, (name, danger, what_to_do) in _CONTROLS.items():
        if control not in engine.controls:
            yield Objection(
                name=name,
                refuses=True,
                detail="the engine cannot set it",
                danger=danger,
                what_to_do=what_to_do,
            )
    if engine.cgroup_driver == "none":
        yield Objection(
            name="cgroup driver",
            refuses=True,
            detail="the engine has none",
            danger="none of its limits would bind",
            what_to_do="a rootless engine needs cgroup v2 and systemd; or run the engine as root",
        )


def _of_versions(
    components: Iterable[Component], holes: Sequence[Hole], refuse_known_bad: bool
) -> Iterator[Objection]:
    for component in components:
        shown = visible_line(component.version, _MAX_WORD_CHARS)
        found = open_holes(component, holes)
        if found:
            cves = ", ".join(cve for hole in found for cve in hole.cves)
            state = f"has known holes ({cves})" if cves else "is out of date"
            good = "; ".join(" or ".join(hole.fixed) or f"a release of {hole.release}" for hole in found)
            yield Objection(
                name=f"{component.name} version",
                refuses=refuse_known_bad,
                detail=f"{component.name} {shown} {state}",
                danger="; ".join(hole.what for hole in found),
                what_to_do=f"update it (good from {good} on; a distribution's package says in its changelog"
                " what it mends)",
            )
        elif not is_readable(component) and any(hole.component == component.name for hole in holes):
            yield Objection(
                name=f"{component.name} number",
                refuses=False,
                detail=f"what {component.name} calls its version ({shown or 'nothing'}) does not tell what"
                " has been mended",
                what_to_do="see to it that the distribution's security updates are installed",
            )


def _of_wall(engine: EngineFacts) -> Iterator[Objection]:
    if not engine.security & {"apparmor", "selinux"}:
        yield Objection(
            name="access control",
            refuses=False,
            detail="neither AppArmor nor SELinux confines containers",
            danger="one layer less",
            what_to_do="enable the one that the distribution ships",
        )


def _of_host(host: HostFacts) -> Iterator[Objection]:
    if host.core_pattern.startswith("|"):
        # core(5): the limit on core files is not enforced for dumps that are piped to a program.
        handler = visible_line(host.core_pattern[1:].split(" ", 1)[0], _MAX_WORD_CHARS)
        yield Objection(
            name="core dumps",
            refuses=False,
            detail=f"the kernel pipes core dumps to {handler}",
            danger="a crash in a cell starts it on the host, as root, with the cell's memory as input",
            what_to_do="sysctl kernel.core_pattern=core",
        )
    if host.same_page_merging:
        yield Objection(
            name="page merging",
            refuses=False,
            detail="the kernel merges equal pages (KSM)",
            danger="one sandbox can find out by timing what is in another's memory",
            what_to_do="echo 0 > /sys/kernel/mm/ksm/run",
        )
    if host.unprivileged_bpf:
        yield Objection(
            name="unprivileged bpf",
            refuses=False,
            detail="every user may load BPF programs",
            danger="in a sandbox only the seccomp profile stands before it",
            what_to_do="sysctl kernel.unprivileged_bpf_disabled=1",
        )
    if 0 <= host.open_files < _LEAST_OPEN_FILES:
        yield Objection(
            name="open files",
            refuses=False,
            detail=f"this process may have {host.open_files} descriptors",
            danger="many sandboxes at once need more",
            what_to_do=f"ulimit -n {_LEAST_OPEN_FILES}",
        )
