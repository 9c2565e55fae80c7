"""What was left open at start (C04): descriptors, working directory and program of the worker and a child."""

import json
import os
import subprocess
import sys

from orchestrator.probes.guest.door import say

_LIST = """
import json, os
def target(name):
    try: return os.readlink(f"/proc/self/fd/{name}")
    except OSError: return ""
print(json.dumps({name: target(name) for name in os.listdir("/proc/self/fd")}))
"""


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


of_worker = {name: _target(f"/proc/1/fd/{name}") for name in os.listdir("/proc/1/fd")}
fresh = subprocess.run(  # noqa: S603 - its own Python
    [sys.executable, "-I", "-c", _LIST], capture_output=True, text=True, check=True, timeout=20
)
say(
    "descriptors",
    {
        "worker": of_worker,
        "child": json.loads(fresh.stdout),
        "cwd": {"worker": _target("/proc/1/cwd"), "here": os.getcwd()},
        "exe": {"worker": _target("/proc/1/exe"), "here": _target("/proc/self/exe")},
    },
)
