"""The image of the test server: made once of Debian's packages, and named by its recipe."""

import fcntl
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import docker
from docker.errors import ImageNotFound

from orchestrator.sandbox.docker_driver import connect_engine

_RECIPE = Path(__file__).parent / "make-root"
_REPOSITORY = "rlm-test-postgres"
_DEADLINE_S = 1_200
_IMPORT_S = 300


def name() -> str:
    """The image of the present recipe."""
    return f"{_REPOSITORY}:{hashlib.sha256(_RECIPE.read_bytes()).hexdigest()[:12]}"


def is_there(client: docker.DockerClient) -> bool:
    """Whether the engine has it."""
    try:
        client.images.get(name())
    except ImageNotFound:
        return False
    return True


def make(client: docker.DockerClient) -> None:
    """Make it, unless it is there."""
    # Of two that begin at once, one waits and finds it.
    with Path(tempfile.gettempdir(), f"{_REPOSITORY}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_there(client):
            return
        # Not the default place: that may be held in memory.
        with tempfile.TemporaryDirectory(prefix="rlm-postgres-", dir="/var/tmp") as folder:
            root = Path(folder, "rootfs.tar")
            subprocess.run([_RECIPE, root], check=True, timeout=_DEADLINE_S)
            client.api.timeout = _IMPORT_S
            repository, version = name().split(":")
            client.api.import_image_from_file(str(root), repository=repository, tag=version)
        client.images.get(name())


if __name__ == "__main__":
    engine = connect_engine()
    try:
        make(engine)
        print(f"postgres: {name()} is there")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    finally:
        engine.close()
