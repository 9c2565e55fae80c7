"""`rlm image build`: the sandbox image of the present sources."""

import signal

import docker
from docker.errors import DockerException

from orchestrator.cli import exits
from orchestrator.cli.exits import Exit
from orchestrator.config import Settings
from orchestrator.errors import EngineError, ImageMissingError
from orchestrator.limits import ENGINE_CALL_S
from orchestrator.sandbox import image


def build(settings: Settings) -> Exit:
    """Build the image unless it is there; its id goes to stdout.

    Raises:
        MachineError: The engine does not answer, or something the image is made from cannot be had.
    """
    # A terminated build must unwind like an interrupted one: it has scripts to end and folders to remove.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        client = docker.from_env(timeout=int(ENGINE_CALL_S))
    except DockerException as error:
        raise EngineError(f"no container engine answers; `deploy/setup-host` sets one up: {error}") from error
    try:
        built = image.build(client, wheelhouse=settings.state_dir / "wheels", say=exits.tell)
    except OSError as error:
        raise ImageMissingError(f"the image's sources cannot be put together: {error}") from error
    finally:
        client.close()
    exits.put(built)
    return Exit.DONE
