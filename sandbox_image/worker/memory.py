"""Whether the kernel killed something for memory."""

from collections.abc import Sequence
from pathlib import Path

# cgroup v1, then v2. Inside a container the sandbox's own group is mounted there.
OOM_FILES = (
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
    Path("/sys/fs/cgroup/memory.events"),
)


def oom_kills(files: Sequence[Path] = OOM_FILES) -> int:
    """How often the kernel killed a process of this group for memory; 0 where it does not tell."""
    for file in files:
        try:
            text = file.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.strip().isdigit():
                return int(count)
    return 0
