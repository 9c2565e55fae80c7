"""Where the provider's key is while a run goes on, looked for from outside: in every byte a process has."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.models.credentials import NAMES

_CHUNK_BYTES = 16 * 1024 * 1024


def memory(pid: int) -> Iterator[bytes]:
    """Everything that a process can read of itself, by mapping and in chunks that overlap."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps, open(f"/proc/{pid}/mem", "rb") as mem:
        for line in maps:
            span, permissions, *_ = line.split()
            if not permissions.startswith("r") or line.rstrip().endswith(
                ("[vvar]", "[vsyscall]", "[vvar_vclock]")
            ):
                continue
            at, end = (int(edge, 16) for edge in span.split("-"))
            while at < end:
                mem.seek(at)
                yield mem.read(min(_CHUNK_BYTES, end - at))
                at += _CHUNK_BYTES - 1_024


def is_in_memory(word: str, pid: int) -> bool:
    return any(word.encode() in chunk for chunk in memory(pid))


class Refusing(ThreadingHTTPServer):
    """A provider that answers whatever path it is asked at, and refuses; it keeps the headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refuse)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Refuse(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Refusing)
        self.server.asked.append(str(self.headers))
        self.rfile.read(int(self.headers["content-length"]))
        self.send_error(400)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server() -> Iterator[Refusing]:
    with Refusing() as refusing:
        serving = threading.Thread(target=refusing.serve_forever)
        serving.start()
        yield refusing
        refusing.shutdown()
        serving.join()


class Asking:
    """The program at work: its own pid and its provider process's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.canary = f"sk-ant-{secrets.token_hex(20)}"
        self.question = f"question {secrets.token_hex(20)}"
        self.pid = 0

    @property
    def has_asked(self) -> bool:
        return (self._folder / "asked").exists()

    @property
    def provider_pid(self) -> int:
        return int((self._folder / "asked").read_text())


@contextmanager
def asking(folder: Path, url: str, **environment: str) -> Iterator[Asking]:
    """The program, with a secret of this test's alone in every variable that holds one."""
    at_work = Asking(folder)
    context = folder / "context.txt"
    context.write_text("hi")
    command = [sys.executable, "-m", "tests.wire.asking_program", "run", at_work.question]
    command += ["--context", str(context), "--base-url", url, "--model", "claude-haiku-5-5"]
    given = {"PATH": os.environ["PATH"], "HOME": str(folder), **environment}
    with subprocess.Popen(
        command,
        env={**given, **dict.fromkeys(NAMES, at_work.canary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            while not at_work.has_asked:
                assert process.poll() is None, "the program ended"
                time.sleep(0.02)
            at_work.pid = process.pid
            yield at_work
        finally:
            # As Ctrl-C does: to everybody of the terminal's session.
            os.killpg(process.pid, signal.SIGINT)
            process.wait(30)


@pytest.mark.case("N01")
@pytest.mark.parametrize(
    "provider",
    [
        {},
        {"RLM_PROVIDER": "foundry", "ANTHROPIC_FOUNDRY_RESOURCE": "mine"},
        {"RLM_PROVIDER": "bedrock", "AWS_REGION": "eu-west-1"},
    ],
    ids=["anthropic", "foundry", "bedrock"],
)
def test_the_orchestrator_has_the_key_nowhere_in_its_memory_or_its_environment(
    tmp_path: Path, server: Refusing, provider: dict[str, str]
) -> None:
    with asking(tmp_path, server.url, **provider) as at_work:
        canary = at_work.canary
        of_orchestrator = Path(f"/proc/{at_work.pid}")
        assert canary.encode() not in (of_orchestrator / "environ").read_bytes()
        assert canary.encode() not in (of_orchestrator / "cmdline").read_bytes()
        assert not is_in_memory(canary, at_work.pid)
        # The search finds what is there: what was asked, and the environment.
        assert is_in_memory(at_work.question, at_work.pid)
        assert is_in_memory(str(tmp_path), at_work.pid)
        # The key is on its way nowhere else: the pipe it came through is gone.
        assert not [fd for fd in (of_orchestrator / "fd").iterdir() if os.readlink(fd).startswith("pipe:")]
        _check_provider_process(at_work)
        assert canary in server.asked[0], "the provider gets it all the same"
    assert not Path(f"/proc/{at_work.provider_pid}").exists()


def _check_provider_process(at_work: Asking) -> None:
    of_provider = Path(f"/proc/{at_work.provider_pid}")
    assert at_work.canary.encode() not in (of_provider / "cmdline").read_bytes()
    limits = (of_provider / "limits").read_text()
    assert "Max core file size        0                    0" in limits
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            (of_provider / "environ").read_bytes()
        return
    # Root may look, and finds it in the memory, where it has to be, and not in the environment.
    assert (of_provider / "environ").stat().st_uid == 0
    assert at_work.canary.encode() not in (of_provider / "environ").read_bytes()
    assert is_in_memory(at_work.canary, at_work.provider_pid)


@pytest.mark.case("N01")
def test_the_search_finds_a_key_that_is_only_unset() -> None:
    """The control: what `os.environ.pop` leaves behind."""
    canary = f"sk-ant-{secrets.token_hex(20)}"
    program = "import os, sys\nos.environ.pop('ANTHROPIC_API_KEY')\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={"ANTHROPIC_API_KEY": canary},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert canary.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert is_in_memory(canary, process.pid)
        process.communicate()
