"""Group D, C06 and G19: ways out."""

from collections.abc import Iterator

from orchestrator.probes.finding import Differs, Facts, Probe
from orchestrator.probes.host import Host

_REFUSED = {"EPERM", "EACCES"}
_NOWHERE = _REFUSED | {"ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED", "EADDRNOTAVAIL", "ENETDOWN"}
"""Under gVisor there are sockets, of a network stack that leads nowhere."""
_BROKER = "/run/rlm/broker.sock"
_LOCAL_NAMES = {"127.0.0.1", "::1", "ff00::0", "ff02::1", "ff02::2", "fe00::0"}


def _arrived(host: Host, *kinds: str) -> Iterator[str]:
    for address, count in host.arrived.items():
        if count and address.startswith(kinds):
            yield f"{count} arrived at the host's {address}"


def _egress(facts: Facts, host: Host) -> Iterator[str | Differs]:
    closed = _NOWHERE if host.runtime == "runsc" else _REFUSED
    for protocol in ("tcp", "udp"):
        if not facts[protocol]:
            raise ValueError(f"no address was tried over {protocol}")
        for address, answer in facts[protocol].items():
            if answer not in closed and not (
                # A datagram to gVisor's own loopback goes to itself.
                protocol == "udp" and host.runtime == "runsc" and address.startswith(("127.", "::1:"))
            ):
                yield f"{protocol} {address}: {answer}"
    if sum(not name.startswith(("@", "udp")) for name in host.arrived) == 0:
        raise ValueError("the host listened nowhere")
    yield from (f"{count} arrived at the host's {name}" for name, count in host.arrived.items() if count)
    if host.runtime == "runsc":
        yield Differs("sockets can be made, of gVisor's own network stack, which leads nowhere")


def _names(facts: Facts, host: Host) -> Iterator[str]:
    if facts["name"] == "open":
        yield "a name was looked up"
    if servers := [line for line in facts["resolv_conf"].splitlines() if line.startswith("nameserver")]:
        yield f"/etc/resolv.conf names {servers}"
    for line in facts["hosts"].splitlines():
        if line.strip() and not line.startswith("#") and line.split()[0] not in _LOCAL_NAMES:
            yield f"/etc/hosts has {line[:80]!r}"
    yield from _arrived(host, "udp")


def _interfaces(facts: Facts, _host: Host) -> Iterator[str]:
    if extra := (set(facts["interfaces"]) | set(facts["devices"])) - {"lo"}:
        yield f"interfaces {sorted(extra)}"
    if facts["routes"]:
        yield f"routes {facts['routes'][:3]}"


def _sockets(facts: Facts, _host: Host) -> Iterator[str]:
    if facts["sockets"] != [_BROKER]:
        yield f"sockets {facts['sockets']}"


def _engine(facts: Facts, host: Host) -> Iterator[str]:
    if facts["docker"]:
        yield f"an HTTP server, as an engine is one, at {facts['docker']}"
    if mounted := [mount["Source"] for mount in host.inspected["Mounts"] if "docker" in mount["Source"]]:
        yield f"mounted: {mounted}"


def _abstract(facts: Facts, host: Host) -> Iterator[str]:
    if not facts["abstract"]:
        raise ValueError("no abstract socket was tried")
    for name, answer in facts["abstract"].items():
        if answer not in _REFUSED | {"ECONNREFUSED"}:
            yield f"@{name}: {answer}"
    yield from _arrived(host, "@")


def _vsock(facts: Facts, _host: Host) -> Iterator[str]:
    if facts["calls"]["socket AF_VSOCK"] not in {"EPERM", "ENOSYS", "EAFNOSUPPORT"}:
        yield f"socket AF_VSOCK: {facts['calls']['socket AF_VSOCK']}"


def _broker_socket(facts: Facts, _host: Host) -> Iterator[str]:
    if len(facts["socket"]) < 4:
        raise ValueError("not everything was tried")
    if done := {
        what: why for what, why in facts["socket"].items() if why not in {"EROFS", "EACCES", "EPERM"}
    }:
        yield f"the broker's socket: {done}"


PROBES = (
    Probe("C06", "no abstract socket of the host", "network", _abstract),
    Probe("D01", "no address is reached", "network", _egress),
    Probe("D02", "no name is looked up", "network", _names),
    Probe("D03", "no interface but the loopback", "network", _interfaces),
    Probe("D04", "one socket, the broker's", "network", _sockets),
    Probe("D05", "no engine's socket", "network", _engine),
    Probe("D06", "no vsock", "calls", _vsock),
    Probe("G19", "the broker's socket cannot be replaced", "mounts", _broker_socket),
)
