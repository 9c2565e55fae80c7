"""What is mounted, and where something can be written (A06, A07, B01, B02)."""

import os
import stat

from orchestrator.probes.guest.door import attempt, attempts, can_create_in, read, say, scratch, writable

_MAX_DIRECTORIES = 20_000
_MAX_SHOWN = 50
"""The line has to stay whole, and a longer one than some kilobytes is cut."""


def _mounts() -> list[tuple[str, str, str, str]]:
    """Mount point, type, options, and what of the source file system is mounted."""
    found = []
    for line in read("/proc/self/mountinfo", 1 << 20).splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        found.append((fields[4], after.split()[0], fields[5], fields[3]))
    return found


def _directories() -> list[str]:
    """All directories outside the kernel's own file systems."""
    found = ["/"]
    for top in sorted(os.listdir("/")):
        if top not in {"proc", "sys"}:
            for directory, _, _ in os.walk("/" + top):
                found.append(directory)
                if len(found) >= _MAX_DIRECTORIES:
                    return found
    return found


def _kind(path: str) -> str:
    mode = os.lstat(path).st_mode
    kinds = {stat.S_IFCHR: "char", stat.S_IFBLK: "block", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "other")


def _create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _make_device(kind: int, device: int) -> dict[str, str]:
    """Whether a node can be made, and then opened."""
    with scratch("probe-device") as path:
        return {
            "made": attempt(lambda: os.mknod(path, kind | 0o600, device)),
            "opened": attempt(lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
            if os.path.lexists(path)
            else "EPERM",
        }


mounts = _mounts()
directories = _directories()
important = [
    os.path.join(directory, name)
    for directory in ("/context", "/run/rlm", "/opt/rlm", "/etc")
    for name in os.listdir(directory)
]
points = [point for point, *_ in mounts]
context_file = "/context/" + min(os.listdir("/context"))
socket_file = "/run/rlm/" + min(os.listdir("/run/rlm"))
say(
    "mounts",
    {
        "mounts": mounts,
        "created_in": sorted(directory for directory in directories if can_create_in(directory))[:_MAX_SHOWN],
        "looked_at": len(directories),
        "writable_points": sorted(
            point for point in points if (can_create_in(point) if os.path.isdir(point) else writable(point))
        ),
        "writable_files": sorted(path for path in important if os.path.isfile(path) and writable(path))[
            :_MAX_SHOWN
        ],
        "devices": {name: _kind("/dev/" + name) for name in os.listdir("/dev")},
        "context": attempts(
            {
                "open for writing": lambda: os.close(os.open(context_file, os.O_RDWR)),
                "truncate": lambda: os.truncate(context_file, 0),
                "chmod": lambda: os.chmod(context_file, 0o666),  # noqa: S103 - that it fails is the point
                "rename": lambda: os.rename(context_file, context_file + "-"),
                "unlink": lambda: os.unlink(context_file),
                "link": lambda: os.link(context_file, "/context/probe-link"),
                "setxattr": lambda: os.setxattr(context_file, "user.probe", b"x"),
                "create beside": lambda: _create("/context/probe-attempt"),
            }
        ),
        "socket": attempts(
            {
                "unlink": lambda: os.unlink(socket_file),
                "rename": lambda: os.rename(socket_file, socket_file + "-"),
                "link over": lambda: os.symlink("/tmp/other", socket_file + "-"),  # noqa: S108
                "create beside": lambda: _create("/run/rlm/probe-attempt"),
            }
        ),
        "mknod": {
            "character device": _make_device(stat.S_IFCHR, os.makedev(1, 3)),
            "block device": _make_device(stat.S_IFBLK, os.makedev(8, 0)),
        },
    },
)
