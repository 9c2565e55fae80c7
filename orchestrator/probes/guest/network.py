"""Every way out that a cell could try (C06, D01-D05)."""

import os
import socket
import stat

from orchestrator.probes.guest.door import arguments, attempt, read, say

_TIMEOUT_S = 2.0
_MAX_ENTRIES = 300_000


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _connect(family: int, kind: int, address: object) -> None:
    with socket.socket(family, kind) as door:
        door.settimeout(_TIMEOUT_S)
        door.connect(address)  # type: ignore[arg-type]
        if kind == socket.SOCK_DGRAM:
            door.send(b"canary")


def _sockets() -> list[str]:
    """Every Unix socket with a name in the file system."""
    found: list[str] = []
    seen = 0
    for top in sorted(os.listdir("/")):
        if top in {"proc", "sys"}:
            continue
        for directory, _, names in os.walk("/" + top):
            for name in names:
                seen += 1
                if seen > _MAX_ENTRIES:
                    return [*found, "too many files to look at"]
                path = os.path.join(directory, name)
                try:
                    if stat.S_ISSOCK(os.lstat(path).st_mode):
                        found.append(path)
                except OSError:
                    continue
    return found


def _says_docker(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_TIMEOUT_S)
        try:
            line.connect(path)
            line.sendall(b"GET /info HTTP/1.0\r\nHost: x\r\n\r\n")
            return b"HTTP/1." in line.recv(64)
        except OSError:
            return False


def _resolve() -> str:
    try:
        socket.getaddrinfo(arguments["name"], 443)
    except OSError as error:
        return type(error).__name__
    return "open"


abstract = sorted(
    {line.split()[-1][1:] for line in read("/proc/net/unix").splitlines()[1:] if line.split()[-1][0] == "@"}
    | set(arguments["abstract"])
)
sockets = _sockets()
say(
    "network",
    {
        "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else [],
        "devices": [line.split(":")[0].strip() for line in read("/proc/net/dev").splitlines()[2:]],
        "routes": read("/proc/net/route").splitlines()[1:],
        "tcp": {
            f"{host}:{port}": attempt(
                lambda host=host, port=port: _connect(  # type: ignore[misc]
                    _family(host), socket.SOCK_STREAM, (host, port)
                )
            )
            for host, port in arguments["tcp"]
        },
        "udp": {
            f"{host}:{port}": attempt(
                lambda host=host, port=port: _connect(_family(host), socket.SOCK_DGRAM, (host, port))  # type: ignore[misc]
            )
            for host, port in arguments["udp"]
        },
        "abstract": {
            name: attempt(lambda name=name: _connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + name))  # type: ignore[misc]
            for name in abstract
        },
        "name": _resolve(),
        "resolv_conf": read("/etc/resolv.conf"),
        "hosts": read("/etc/hosts"),
        "sockets": sockets,
        "docker": [path for path in sockets if _says_docker(path)],
    },
)
