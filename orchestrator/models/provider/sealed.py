"""Credentials on their way to the provider process: in a pipe, where the kernel keeps them.

Whoever reads the pipe first has them, and nobody after. A process that only carries its end has nothing of
them in its memory, its arguments or its environment.
"""

import json
import os
import stat
from collections.abc import Mapping

from orchestrator.errors import InvalidRequestError, KeyMissingError
from orchestrator.models.credentials import Credentials

VARIABLE = "RLM_CREDENTIALS_FD"
"""Where `cli.start` tells the next program of its process which descriptor is the pipe's end."""


class SealedCredentials:
    """The reading end of such a pipe. Whoever makes one closes it, or gives it to the provider process."""

    def __init__(self, fd: int) -> None:
        """Of a descriptor that is a pipe's reading end, and is this object's from now on."""
        self._fd: int | None = fd

    @classmethod
    def of(cls, given: Credentials) -> "SealedCredentials":
        """These credentials, by the names the environment has for them. May be empty.

        Raises:
            KeyMissingError: They are longer than any credentials, and than a pipe.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        text = json.dumps(dict(given)).encode()
        try:
            # Nobody reads yet, so what has no room now never will.
            fits = os.write(writing, text) == len(text)
        except BlockingIOError:
            fits = False
        finally:
            os.close(writing)
        if not fits:
            os.close(reading)
            raise KeyMissingError("the credentials are longer than any credentials are")
        os.set_blocking(reading, True)
        return cls(reading)

    @classmethod
    def handed_over(cls, environment: Mapping[str, str]) -> "SealedCredentials":
        """Those that `cli.start` sealed; none if there were none.

        Raises:
            InvalidRequestError: The variable names no pipe. It is not a person's to set.
        """
        told = environment.get(VARIABLE)
        if told is None:
            return cls.of({})
        try:
            fd = int(told)
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        except (ValueError, OverflowError, OSError):
            is_pipe = False
        if not is_pipe:
            raise InvalidRequestError(f"{VARIABLE} is set by this program for itself, and names no pipe here")
        # Programs that this one starts don't get it.
        os.set_inheritable(fd, False)
        return cls(fd)

    def take(self) -> int:
        """The descriptor, which is the caller's from now on.

        Raises:
            KeyMissingError: It has been taken before.
        """
        if self._fd is None:
            raise KeyMissingError("the credentials have been handed over already, once and for all")
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Unless taken: nobody gets them."""
        if self._fd is not None:
            os.close(self.take())


def unseal(fd: int) -> dict[str, str]:
    """The credentials in the pipe, which is closed then. In the provider process only.

    Raises:
        KeyMissingError: Somebody else has read them.
    """
    with os.fdopen(fd, "rb") as pipe:
        text = pipe.read()
    if not text:
        raise KeyMissingError("the credentials have been handed over already, once and for all")
    given: dict[str, str] = json.loads(text)
    return given
