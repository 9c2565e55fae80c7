"""A PostgreSQL server in a container, for the length of a block.

It has no network: its socket is in a directory that it shares with the tests. So nothing else on the machine
can reach it, and the engine needs no ports.
"""

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from orchestrator.sandbox.docker_driver import connect_engine
from tests.postgres import image

# It would come from a registry. The container is removed by the block that started it.
testcontainers_config.ryuk_disabled = True

PASSWORD = "not-a-secret-elsewhere"  # noqa: S105 - of a server without a network
_SOCKETS = "/sockets"
_START_S = 45.0
_AT_ONCE = 8
"""Databases made together."""
# Its process is killed here, the machine never: what it gave to the kernel is kept without `fsync`.
_START = f"""
set -e
bin=$(echo /usr/lib/postgresql/*/bin)
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    "$bin/initdb" --no-sync --username=postgres --auth=scram-sha-256 --pwfile=<(echo "$PGPASSWORD") \
        --locale=C.UTF-8 --pgdata="$PGDATA"
fi
exec "$bin/postgres" -D "$PGDATA" -c listen_addresses= -c unix_socket_directories={_SOCKETS} \
    -c max_connections=100 -c fsync=off
"""


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """One that runs."""

    container: DockerContainer
    sockets: Path
    _unused: list[str] = field(default_factory=list)

    def new_database(self) -> str:
        """The URL of a database that nobody else uses."""
        if not self._unused:
            # A program beside the server takes longer to start than a database to be made.
            names = [f"rlm_{secrets.token_hex(6)}" for _ in range(_AT_ONCE)]
            self.run("psql", "--quiet", *(f"--command=CREATE DATABASE {name}" for name in names))
            self._unused.extend(names)
        return self.url(self._unused.pop())

    def url(self, name: str) -> str:
        """Of a database of this server."""
        return f"postgresql://postgres:{PASSWORD}@/{name}?host={self.sockets}"

    def run(self, program: str, *arguments: str) -> str:
        """What one of PostgreSQL's programs says, beside the server."""
        done = self.container.exec([program, *arguments])
        said = done.output.decode(errors="replace")
        assert done.exit_code == 0, f"{program}: {said}"
        return said

    def kill(self) -> None:
        """As by a loss of power."""
        self._docker().kill()

    def stop(self) -> None:
        """As by its administrator: connections are ended at once."""
        self._docker().kill("SIGINT")
        self._docker().wait(timeout=_START_S)

    def start(self) -> None:
        """Again, and wait until it answers."""
        self._docker().start()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + _START_S
        while self._docker().exec_run(["pg_isready", "--quiet"]).exit_code:
            assert time.monotonic() < deadline, "the test server does not answer"
            time.sleep(0.1)

    def _docker(self) -> Any:
        return self.container.get_wrapped_container()


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A server that nobody else uses, gone after the block with everything in it."""
    engine = connect_engine()
    try:
        assert image.is_there(engine), "there is no image of the test server: run `make postgres-image`"
    finally:
        engine.close()
    # Not `tmp_path`: the path of a Unix socket below it may have 107 bytes.
    sockets = Path(tempfile.mkdtemp(prefix="rlmpg", dir="/tmp"))
    # The server has a uid of its own.
    sockets.chmod(0o777)
    container = DockerContainer(
        image.name(),
        command=cast(Any, ["bash", "-c", _START]),  # its types know a string only
        env={
            "PGDATA": "/var/lib/postgresql/rlm",
            "PGPASSWORD": PASSWORD,
            "PGHOST": _SOCKETS,
            "PGUSER": "postgres",
        },
        volumes=[(str(sockets), _SOCKETS, "rw")],
        user="postgres",
        network_mode="none",
    )
    try:
        with container:
            server = PostgresServer(container, sockets)
            server.wait_until_ready()
            yield server
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
