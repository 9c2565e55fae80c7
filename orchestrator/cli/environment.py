"""The environment of the command line, read here and nowhere else."""

import os
from collections.abc import Mapping
from types import MappingProxyType

from orchestrator.config import Settings, read_settings

NOTHING: Mapping[str, str] = MappingProxyType({})


def settings(instead: Mapping[str, str] = NOTHING) -> Settings:
    """The process's settings.

    Args:
        instead: What options of the command line say, by the settings' names.

    Raises:
        InvalidRequestError: A setting is unknown, or makes no sense.
    """
    return read_settings({**os.environ, **instead})


def api_key() -> str:
    """RLM_API_KEY, of a client of the service; empty when there is none.

    Apart from the settings, which go to everything in this process.
    """
    return os.environ.get("RLM_API_KEY", "")


def terminal() -> str | None:
    """TERM: what the terminal can do."""
    return os.environ.get("TERM")


def quieten_grpc() -> None:
    """Keep gRPC's core from writing to stderr by itself, past everything that makes text visible.

    A guest or a server can provoke it.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
