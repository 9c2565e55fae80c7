"""A container engine of a test's own, which it may stop and kill: data, sockets and containerd apart."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docker import DockerClient

_UP_WITHIN_S = 30.0
_DOWN_WITHIN_S = 30.0


class PrivateEngine:
    """Started by `up`, and again after it was stopped or killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"unix://{directory / 'engine.sock'}"
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> DockerClient:
        """A client of the running engine."""
        arguments = [
            # An engine without a bridge removes docker0, which belongs to the machine's own one.
            "unshare",
            "--net",
            "dockerd",
            f"--data-root={self.directory / 'data'}",
            f"--exec-root={self.directory / 'exec'}",
            f"--pidfile={self.directory / 'pid'}",
            f"--host={self.address}",
            "--bridge=none",
            "--iptables=false",
            "--ip-masq=false",
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
        give_up_s = time.monotonic() + _UP_WITHIN_S
        while not _listens(self.directory / "engine.sock"):
            assert time.monotonic() < give_up_s, (self.directory / "log").read_text()[-2_000:]
            assert self._process.poll() is None, (self.directory / "log").read_text()[-2_000:]
            time.sleep(0.1)
        return DockerClient(base_url=self.address, version="auto", timeout=60)

    def hang(self) -> None:
        """It keeps its sockets, and answers nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After it hung; else nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def end(self, number: signal.Signals) -> None:
        """End the daemon with a signal: SIGTERM takes its containers along, SIGKILL leaves them running."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_DOWN_WITHIN_S)
            if number is signal.SIGKILL:
                # Else the next one takes the pid, which may be another process's, for its own.
                (self.directory / "pid").unlink(missing_ok=True)
            self._process = None


@contextmanager
def private_engine(shared: DockerClient, image_id: str) -> Iterator[PrivateEngine]:
    """An engine that has the sandbox image, for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="rlmd", dir="/tmp", ignore_cleanup_errors=True) as directory:
        engine = PrivateEngine(Path(directory))
        try:
            client = engine.up()
            client.images.load(b"".join(shared.images.get(image_id).save()))
            client.close()
            engine.end(signal.SIGTERM)
            yield engine
        finally:
            engine.end(signal.SIGTERM)
            _end_processes_of(engine.directory)
            for mount in reversed(_mounts_below(engine.directory)):
                subprocess.run(["/bin/umount", "--lazy", mount], check=False)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _end_processes_of(directory: Path) -> None:
    """Its containerd and shims, known by the path that only they name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if (
                command.startswith((b"containerd", b"/usr/bin/containerd"))
                and os.fsencode(directory) in command
            ):
                os.kill(int(entry.name), signal.SIGKILL)


def _mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [path for line in lines if (path := line.split()[4]).startswith(str(directory))]
