"""Settings of the process: environment to frozen dataclasses, read once by the composition root."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import InvalidRequestError

_PREFIX = "RLM_"
_KNOWN = {"RLM_STATE_DIR", "RLM_IMAGE", "RLM_MAX_SANDBOXES", "RLM_SANDBOX_MEMORY_MIB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSettings:
    """How every sandbox is built."""

    memory_mib: int = 512
    """Hard limit, RLM_SANDBOX_MEMORY_MIB. A cell that passes it is killed and its namespace is lost."""
    cpus: float = 1.0
    """Of one processor."""
    pids: int = 256
    """Processes and threads. gVisor counts its own threads too, hence not less."""
    tmp_mib: int = 128
    """The guest's /tmp, in memory and counted against `memory_mib`."""
    shm_mib: int = 16
    """The guest's /dev/shm, private: `multiprocessing` needs some."""
    open_files: int = 1_024
    file_size_mib: int = 256
    """The largest file a cell can write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything the process is told by its environment."""

    state_dir: Path
    """RLM_STATE_DIR: sockets and staged contexts, private to this user. Its path must be short: a Unix
    socket's path has at most 107 bytes."""
    image: str = ""
    """RLM_IMAGE: an image id or digest; empty for the image built from the present sources."""
    max_sandboxes: int = 16
    """RLM_MAX_SANDBOXES: containers at once. A run tree needs max_depth + 1 of them."""
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    api_key: str = field(default="", repr=False)
    """ANTHROPIC_API_KEY. Sent to the provider and nowhere else."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The process's settings.

    Raises:
        InvalidRequestError: A name starting with RLM_ is unknown (most likely misspelt), or a value makes no
            sense.
    """
    unknown = sorted(name for name in environment if name.startswith(_PREFIX) and name not in _KNOWN)
    if unknown:
        raise InvalidRequestError(
            f"unknown settings: {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN))}"
        )
    return Settings(
        state_dir=Path(environment.get("RLM_STATE_DIR") or _default_state_dir(environment)),
        image=environment.get("RLM_IMAGE", ""),
        max_sandboxes=_positive(environment, "RLM_MAX_SANDBOXES", 16),
        sandbox=SandboxSettings(memory_mib=_positive(environment, "RLM_SANDBOX_MEMORY_MIB", 512)),
        api_key=environment.get("ANTHROPIC_API_KEY", ""),
    )


def _default_state_dir(environment: Mapping[str, str]) -> str:
    if os.geteuid() == 0:
        return "/var/lib/rlm"
    state_home = environment.get("XDG_STATE_HOME") or os.path.join(
        environment.get("HOME", "/"), ".local", "state"
    )
    return os.path.join(state_home, "rlm")


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise InvalidRequestError(f"{name} must be a whole number above 0, not {text!r}")
    return int(text)
