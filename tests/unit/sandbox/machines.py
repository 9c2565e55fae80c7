"""Answers of engines as tests need them: a healthy one, to take something away from."""

from collections.abc import Mapping
from typing import Any


def info(**changed: Any) -> dict[str, Any]:
    """The answer to `GET /info` of an engine that has everything, with some of it changed."""
    return {
        "ServerVersion": "29.6.0",
        "OSType": "linux",
        "KernelVersion": "6.12.90",
        "CgroupVersion": "2",
        "CgroupDriver": "systemd",
        "MemoryLimit": True,
        "SwapLimit": True,
        "PidsLimit": True,
        "CpuCfsQuota": True,
        "CpuCfsPeriod": True,
        "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"],
        "Runtimes": {
            "io.containerd.runc.v2": {"path": "runc"},
            "runc": {"path": "runc"},
            "runsc": {"path": "/usr/local/bin/runsc", "runtimeArgs": ["--platform=systrap"]},
        },
        **changed,
    }


def version(**components: str) -> Mapping[str, Any]:
    """The answer to `GET /version`, with the versions of some components changed."""
    versions = {"Engine": "29.6.0", "containerd": "v2.2.1", "runc": "1.4.3", **components}
    return {
        "Version": versions["Engine"],
        "ApiVersion": "1.51",
        "Components": [
            {"Name": name, "Version": number, "Details": {"GitCommit": "59923ef"}}
            for name, number in versions.items()
        ],
    }
