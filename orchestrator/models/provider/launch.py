"""Starting the provider process, and ending it. Light: the command line does so before its heavy imports."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from orchestrator.models.platforms import ANTHROPIC_URL, Platform
from orchestrator.models.provider.sealed import SealedCredentials


class ProviderProcess:
    """A process of its own, which has the credentials, and a channel to it that nobody else can open.

    It is started at once, so that what it imports, a second's worth, is imported while its orchestrator does
    something else; `connection.connect` waits for it. Close it, or use it as a context manager: then it is
    gone. It goes too when its orchestrator does, however that ends.
    """

    def __init__(
        self,
        credentials: SealedCredentials,
        *,
        base_url: str = "",
        platform: Platform | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            credentials: Taken from this process, for good.
            base_url: Where calls go; empty for the platform's public address.
            platform: None for Anthropic's own address and servers like it.
            environment: All of the process's own (`provider.environment`).

        Raises:
            KeyMissingError: The credentials have been taken before.
        """
        self.base_url = base_url or (platform.url if platform else ANTHROPIC_URL)
        """Where calls go."""
        self.platform = platform
        """Where the models are served; None for Anthropic's own address and servers like it."""
        credentials_fd = credentials.take()
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                # -P: the folder that a person happens to be in is no place to import from.
                [
                    sys.executable, "-P", "-m", "orchestrator.models.provider",
                    str(theirs.fileno()), str(credentials_fd),
                ],
                pass_fds=(theirs.fileno(), credentials_fd),
                env={**(environment or {}), "PYTHONPATH": _import_path()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Out of reach of the terminal's Ctrl-C: calls in flight have to settle first.
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(credentials_fd)
        self.channel = ours
        """Of `connection.connect`, which can be called once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is gone. Nobody can start another: the credentials went with it."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it. It has nothing to finish: calls in flight have been settled as lost before, or are now.

        Blocks for as long as the kernel takes to end a process.
        """
        self.channel.close()
        self._process.kill()
        self._process.wait()


def _import_path() -> str:
    """What this process imports from, so that the other one runs the same code, wherever it comes from."""
    return os.pathsep.join(path for path in sys.path if os.path.isabs(path))
