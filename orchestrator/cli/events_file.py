"""The `--events` file: every event of a run tree, one JSON object a line (docs/events.md)."""

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrator.cli.json_line import json_line
from orchestrator.errors import InvalidRequestError
from orchestrator.trajectory import Event


class EventsFile:
    """An observer that writes each event at once, so that the file can be followed while the run goes on.

    Opened before anything costs money. An existing file keeps its content until the first event: a call that
    is refused destroys nothing. A write that fails is said once and ends the file, not the run.
    """

    def __init__(self, path: Path, *, inputs: Iterable[Path], warn: Callable[[str], None]) -> None:
        """Open the file for writing.

        Args:
            path: Made if missing, readable by its owner alone: it holds what the context holds.
            inputs: Paths that must not be overwritten.
            warn: Told once when writing fails.

        Raises:
            InvalidRequestError: The file cannot be written, or is one of the inputs.
        """
        self._path = path
        self._warn = warn
        try:
            # Opening a pipe that nobody reads would wait for ever; non-blocking, it fails.
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags, 0o600)
            os.set_blocking(self._descriptor, True)
        except OSError as error:
            raise InvalidRequestError(f"cannot write --events {path}: {error.strerror}") from error
        mine = os.fstat(self._descriptor)
        for given in inputs:
            if given.exists() and os.path.samestat(mine, given.stat()):
                os.close(self._descriptor)
                raise InvalidRequestError(f"--events {path} would overwrite the context {given}")
        self._untouched = stat.S_ISREG(mine.st_mode)
        self._broken = False

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self.write(event.to_json())

    def write(self, event: Mapping[str, object]) -> None:
        """Write one event as it came, whatever kind it is."""
        if self._broken:
            return
        line = (json_line(event) + "\n").encode("ascii")
        try:
            if self._untouched:
                os.ftruncate(self._descriptor, 0)
                self._untouched = False
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            self._broken = True
            self._warn(f"rlm: --events {self._path} cannot be written any more: {error.strerror}")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
