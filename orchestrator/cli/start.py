"""The first moments of `rlm`: the model provider's credentials leave this process, for good.

The environment a process is started with stays readable in it, and in /proc/<pid>/environ, whatever is unset
later; and what Python has once read from it lies about in its memory. So the credentials go into a pipe
(`models.provider.sealed`), and the process becomes the same program again with the rest of the environment:
new memory, in which they never were. It keeps its pid, its terminal and its arguments, and loses two
hundredths of a second, since nothing heavy has been imported yet.

The shell that started it has them still; that is its business.
"""

import os
import sys

from orchestrator.cli import exits
from orchestrator.errors import OrchestratorError
from orchestrator.models import credentials
from orchestrator.models.provider.sealed import VARIABLE, SealedCredentials


def main() -> None:
    """The entry point of `rlm`."""
    try:
        leave_credentials_behind()
    except OrchestratorError as error:
        exits.complain(error)
        raise SystemExit(exits.exit_for(error)) from None
    from orchestrator.cli import main as command_line  # noqa: PLC0415 - typer, a tenth of a second

    command_line.main()


def leave_credentials_behind() -> None:
    """Begin again without the credentials in the environment, if there are any. Does not return then.

    Raises:
        KeyMissingError: They are no credentials, by their length.
    """
    if not credentials.NAMES & os.environ.keys():
        return
    fd = SealedCredentials.of(credentials.of_environment(os.environ)).take()
    os.set_inheritable(fd, True)
    rest = {name: value for name, value in os.environ.items() if name not in credentials.NAMES}
    # Not `sys.argv`: Python's own options belong to the program too.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**rest, VARIABLE: str(fd)})  # noqa: S606
