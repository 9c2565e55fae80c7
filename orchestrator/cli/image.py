"""`rlm image build`: the sandbox image of the present sources."""

import signal

from orchestrator.cli import exits
from orchestrator.cli.exits import Exit
from orchestrator.config import Settings
from orchestrator.errors import ImageMissingError
from orchestrator.sandbox import image
from orchestrator.sandbox.docker_driver import connect_engine


def build(settings: Settings) -> Exit:
    """Build the image unless it is there; its id goes to stdout.

    Raises:
        MachineError: The engine does not answer, or something the image is made from cannot be had.
    """
    # A terminated build must unwind like an interrupted one: it has scripts to end and folders to remove.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    client = connect_engine()
    try:
        built = image.build(client, wheelhouse=settings.state_dir / "wheels", say=exits.tell)
    except OSError as error:
        raise ImageMissingError(f"the image's sources cannot be put together: {error}") from error
    finally:
        client.close()
    exits.put(built)
    return Exit.DONE
