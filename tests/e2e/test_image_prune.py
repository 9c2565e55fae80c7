"""`rlm image prune` on an engine of its own: what it removes on the shared one would be others'."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from docker import DockerClient
from docker.errors import ImageNotFound

from orchestrator.sandbox.image import BASE_REPOSITORY, SOURCE_LABEL, source_hash, sources, tag
from orchestrator.sandbox.image_leftovers import PART_LABEL, Leftover, remove
from tests.security.private_engine import PrivateEngine, private_engine

pytestmark = pytest.mark.timeout(120)

OLD_SOURCE = f"LABEL {SOURCE_LABEL}={'0' * 64}"


@pytest.fixture(scope="module")
def private(engine: DockerClient, image_id: str) -> Iterator[tuple[PrivateEngine, DockerClient]]:
    """An engine of one's own, and its client."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("NOT TESTED: an engine of one's own takes root and dockerd")
    with private_engine(engine, image_id) as started:
        client = started.up()
        with closing(client):
            client.images.get(image_id).tag(tag(source_hash(sources())))
            yield started, client
        started.end(signal.SIGTERM)


def made(client: DockerClient, name: str, *changes: str) -> str:
    """The id of an image with next to nothing in it."""
    repository, _, version = name.partition(":")
    lines = [*changes, f"ENV MADE_AS={name}", 'CMD ["/none"]']
    client.api.import_image_from_data(bytes(10_240), repository=repository, tag=version, changes=lines)
    return str(client.images.get(name).id)


def prune(private: PrivateEngine, directory: Path, *options: str) -> list[str]:
    """What the command prints."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RLM_")}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "image", "prune", *options],
        env={**mine, "DOCKER_HOST": private.address, "RLM_STATE_DIR": str(directory)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def names(client: DockerClient) -> set[str]:
    return {name for image in client.images.list() for name in image.tags}


def test_prune_removes_what_is_ours_and_unused_and_nothing_else(
    private: tuple[PrivateEngine, DockerClient], image_id: str, tmp_path: Path
) -> None:
    engine, client = private
    stale = made(client, "rlm-sandbox:stale", OLD_SOURCE)
    named_by_others = made(client, "rlm-sandbox:kept-by-name", OLD_SOURCE)
    client.images.get(named_by_others).tag("mine:1")
    stage = made(client, "stage:x", f"LABEL {PART_LABEL}=stage")
    made(client, "stage:x")
    assert client.images.get(stage).tags == []
    in_use = made(client, "rlm-sandbox:in-use", OLD_SOURCE)
    container = client.api.create_container(in_use)
    made(client, f"{BASE_REPOSITORY}:0123")
    others = {"postgres:17", "rlm-sandbox:theirs"}
    for name in others:
        made(client, name)

    planned = prune(engine, tmp_path, "--dry-run")
    assert len(planned) == 4
    assert client.images.get(stale).id == stale
    removed = prune(engine, tmp_path)
    assert [line.removeprefix("removed ") for line in removed] == [
        line.removeprefix("would remove ") for line in planned
    ]

    present = {tag(source_hash(sources())), "stage:x", "mine:1", "rlm-sandbox:in-use"}
    assert names(client) == present | others
    assert client.images.get(image_id).id == image_id
    assert client.images.get(named_by_others).tags == ["mine:1"]
    for image in (stale, stage):
        with pytest.raises(ImageNotFound):
            client.images.get(image)

    client.api.remove_container(container["Id"])
    assert prune(engine, tmp_path) == [f"removed rlm-sandbox:in-use, {0} MB"]
    assert prune(engine, tmp_path) == []


def test_an_image_that_a_container_was_made_of_meanwhile_stays(
    private: tuple[PrivateEngine, DockerClient],
) -> None:
    _, client = private
    image = made(client, "rlm-sandbox:taken", OLD_SOURCE)
    container = client.api.create_container(image)
    nameless = Leftover(image_id=image, names=(), size_bytes=0)
    assert remove(client, nameless) == "something is made of it"
    client.api.remove_container(container["Id"])
    assert remove(client, nameless) == ""
    assert remove(client, nameless) == ""
