"""What a sandbox is created with, written down whole in golden_hostconfig.json.

Whatever changes there changes what a hostile guest can do. In place of the seccomp profile it has its hash,
and placeholders where sandboxes differ.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import Resources

GOLDEN: Mapping[str, Any] = json.loads((Path(__file__).parent / "golden_hostconfig.json").read_text())

RESOURCES = Resources(
    memory_bytes=512 << 20,
    cpus=1.0,
    pids=256,
    tmp_bytes=128 << 20,
    shm_bytes=16 << 20,
    open_files=1_024,
    file_size_bytes=256 << 20,
)
"""Of the default settings."""


def as_golden(body: Mapping[str, Any], spec: SandboxSpec, *, image: str, instance_id: str) -> dict[str, Any]:
    """A creation body as the golden file has it."""
    replaced = {
        str(spec.socket_dir): "<socket dir>",
        str(spec.context_dir): "<context dir>",
        f"{spec.uid}:{spec.uid}": "<uid>:<uid>",
        str(spec.uid): "<uid>",
        spec.sandbox_id: "<sandbox id>",
        str(spec.expires_at_s): "<expiry>",
        spec.runtime: "<runtime>",
        image: "<image id>",
        instance_id: "<instance id>",
    }

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: walk(each) for name, each in value.items()}
        if isinstance(value, list):
            return [walk(each) for each in value]
        if isinstance(value, str):
            return replaced.get(value, _hashed(value))
        return value

    made: dict[str, Any] = walk(body)
    return made


def _hashed(option: str) -> str:
    name, _, profile = option.partition("=")
    return f"seccomp={hashlib.sha256(profile.encode()).hexdigest()}" if name == "seccomp" else option
