import os
import sys
from pathlib import Path
from typing import Any, cast

import docker
import pytest
from docker.errors import ImageNotFound

from orchestrator.errors import EngineError, ImageMissingError, InvalidRequestError
from orchestrator.sandbox import image


def test_the_hash_does_not_depend_on_the_order_of_the_files() -> None:
    assert image.source_hash({"a": b"1", "b": b"2"}) == image.source_hash({"b": b"2", "a": b"1"})


@pytest.mark.parametrize(
    "other",
    [
        {"a": b"1", "b": b"3"},
        {"a": b"1", "c": b"2"},
        {"a": b"1"},
        {"a": b"12", "b": b""},
        {"a": b"11 1 b2"},
    ],
)
def test_any_other_set_of_files_has_another_hash(other: dict[str, bytes]) -> None:
    assert image.source_hash({"a": b"1", "b": b"2"}) != image.source_hash(other)


def test_the_guest_gets_its_own_protos_and_none_of_the_clients() -> None:
    protos = {name for name in image.sources() if name.startswith("packages/rlm_proto/")}
    assert {"packages/rlm_proto/__init__.py", "packages/rlm_proto/v1/broker_pb2_grpc.py"} <= protos
    assert not [name for name in protos if "run_pb2" in name or not name.endswith(".py")]


def test_everything_the_dockerfile_copies_is_in_the_context() -> None:
    files = image.sources()
    copied = [
        line.split()[1].rstrip("/")
        for line in files["Dockerfile"].decode().splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    # The wheels are not sources: `requirements.txt` names them by their hashes.
    copied.remove("wheels")
    assert copied
    for path in copied:
        assert any(name == path or name.startswith(f"{path}/") for name in files)


def test_every_requirement_is_pinned_by_version_and_hash() -> None:
    text = image.sources()["requirements.txt"].decode().replace("\\\n", "")
    requirements = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert requirements
    for requirement in requirements:
        assert "==" in requirement
        assert "--hash=sha256:" in requirement


class FakeImage:
    def __init__(self, source: str) -> None:
        self.id = "sha256:0123"
        self.labels = {image.SOURCE_LABEL: source}


class FakeEngine:
    """As much of a docker client as finding an image takes: it is its own collection of images."""

    def __init__(self, images: dict[str, FakeImage], *, broken: bool = False) -> None:
        self.images = self
        self._images = images
        self._broken = broken

    def get(self, name: str) -> FakeImage:
        if self._broken:
            raise docker.errors.DockerException("cannot reach it\nmore")
        if name not in self._images:
            raise ImageNotFound(name)
        return self._images[name]

    def list(self, name: str) -> list[FakeImage]:
        return [found for tagged, found in self._images.items() if tagged.startswith(f"{name}:")]


def find_in(images: dict[str, FakeImage], *, broken: bool = False) -> str:
    return image.find(cast(docker.DockerClient, FakeEngine(images, broken=broken)))


def test_the_image_of_the_present_sources_is_found() -> None:
    present = image.source_hash(image.sources())
    assert find_in({image.tag(present): FakeImage(present)}) == "sha256:0123"


def test_a_missing_image_is_an_error_that_says_how_to_build_it() -> None:
    with pytest.raises(ImageMissingError, match=r"has not been built: run `rlm image build`"):
        find_in({})


def test_an_image_of_other_sources_is_refused_whatever_its_tag() -> None:
    present = image.source_hash(image.sources())
    with pytest.raises(ImageMissingError, match=r"other sources.*`rlm image build`"):
        find_in({image.tag(present): FakeImage("f" * 64)})


def test_an_engine_that_fails_is_told_from_a_missing_image() -> None:
    with pytest.raises(EngineError, match=r"look for the sandbox image: cannot reach it$"):
        find_in({}, broken=True)


def test_a_program_past_its_deadline_is_ended_with_its_children(tmp_path: Path) -> None:
    trap = f"trap 'touch {tmp_path}/cleaned' EXIT; echo started; sleep 60 & wait"
    told: list[str] = []
    code, last_lines = image._run(["bash", "-c", trap], deadline_s=0.5, say=told.append)
    assert code != 0
    assert told == ["started"]
    assert last_lines == "started"
    assert (tmp_path / "cleaned").exists()


def test_the_last_lines_of_a_program_are_kept() -> None:
    code, last_lines = image._run(
        [sys.executable, "-c", "[print(i) for i in range(9)]; exit(4)"], deadline_s=30
    )
    assert (code, last_lines) == (4, "6 / 7 / 8")


def test_the_guest_can_read_what_is_written_under_a_private_umask(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        image._write_files({"a/b/code.py": b"pass", "a/script": b"#!/bin/sh"}, tmp_path)
    finally:
        os.umask(umask)
    modes = {
        name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/code.py", "a/script")
    }
    assert modes == {"a": 0o755, "a/b": 0o755, "a/b/code.py": 0o644, "a/script": 0o755}


def test_an_image_named_by_a_tag_alone_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="id or digest"):
        image.pinned(cast(Any, None), "rlm-sandbox:latest")
