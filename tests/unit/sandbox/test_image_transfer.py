"""What is checked when an image goes into a file and out of one, with an engine that can be made to lie."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import docker
import pytest
from docker.errors import ImageNotFound

from orchestrator.errors import EngineError, InvalidRequestError
from orchestrator.sandbox import image, image_transfer
from orchestrator.sandbox.image import SOURCE_LABEL
from tests.unit.sandbox.test_image_archive import LAYERS, configuration, digest, image_file

PRESENT = image.source_hash(image.sources())
SETTINGS = {"Labels": {SOURCE_LABEL: PRESENT}, "User": "65532:65532", "Cmd": None}
CONFIGURATION = configuration(config=SETTINGS)
OURS = image_file(CONFIGURATION)
OUR_ID = digest(CONFIGURATION)


class FakeEngine:
    """As much of a docker client as saving and loading takes: it is its own `images` and `api`."""

    def __init__(self, *, names_by_manifest: bool = False, keeps: str = "") -> None:
        self.images = self
        self.api = self
        self.timeout = 60.0
        self.loads = 0
        self._names_by_manifest = names_by_manifest
        self._keeps = keeps
        """The configuration it stores whatever it is given; the given one when empty."""
        self._stored: dict[str, dict[str, Any]] = {}

    def version(self) -> dict[str, str]:
        return {"Arch": "amd64"}

    def get(self, name: str) -> Any:
        found = next((attrs for tag, attrs in self._stored.items() if name in {tag, attrs["Id"]}), None)
        if found is None:
            raise ImageNotFound(name)
        return SimpleNamespace(
            id=found["Id"],
            attrs=found,
            labels=found["Config"].get("Labels") or {},
            tag=lambda repository, version: self._stored.update({f"{repository}:{version}": found}),
        )

    def put(self, tag: str, content: bytes) -> None:
        facts = json.loads(content)
        self._stored[tag] = {
            "Id": "sha256:" + "a" * 64 if self._names_by_manifest else digest(content),
            "Created": facts["created"],
            "RootFS": {"Layers": facts["rootfs"]["diff_ids"]},
            "Config": facts["config"],
        }

    def load_image(self, pieces: Iterable[bytes]) -> Iterator[dict[str, str]]:
        self.loads += 1
        with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
            manifest = json.loads(self._member(tar, "manifest.json"))[0]
            content = self._keeps.encode() or self._member(tar, manifest["Config"])
        for tag in manifest["RepoTags"]:
            self.put(tag, content)
        yield {"stream": "Loaded"}

    def get_image(self, _name: str, chunk_size: int) -> Iterator[bytes]:
        yield from (OURS[start : start + chunk_size] for start in range(0, len(OURS), chunk_size))

    @staticmethod
    def _member(tar: tarfile.TarFile, name: str) -> bytes:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def load(engine: FakeEngine, content: bytes, expected_id: str = "") -> str:
    client = cast(docker.DockerClient, engine)
    return image_transfer.load(client, io.BytesIO(content), expected_id=expected_id, say=lambda _: None)


def test_what_was_saved_can_be_loaded() -> None:
    saving = FakeEngine()
    saving.put(image.tag(PRESENT), CONFIGURATION)
    sink = io.BytesIO()
    saved = image_transfer.save(cast(docker.DockerClient, saving), OUR_ID, sink, advance=lambda _: None)
    assert saved.image_id == OUR_ID
    loading = FakeEngine()
    assert load(loading, sink.getvalue(), OUR_ID) == OUR_ID
    assert loading.get(image.tag(PRESENT)).id == loading.get("rlm-sandbox:latest").id == OUR_ID
    assert loading.timeout == 60.0


def test_the_engine_gets_our_tag_and_none_that_the_file_asks_for() -> None:
    engine = FakeEngine()
    load(engine, OURS)
    with pytest.raises(ImageNotFound):
        engine.get("precious:latest")


@pytest.mark.parametrize(
    ("content", "expected_id", "why"),
    [
        (OURS[: len(OURS) // 2], "", "cut off"),
        (gzip.compress(OURS)[:-1], "", "cut off"),
        (OURS.replace(b"upper", b"UPPER"), "", "not the one that its configuration names"),
        (b"Dear operator", "", "image archive is refused"),
        (OURS, "sha256:" + "0" * 64, "not sha256:0"),
        (image_file(configuration(config={"Labels": {SOURCE_LABEL: "f" * 64}})), "", "of another version"),
        (image_file(configuration(config={"Labels": None})), "", "no sandbox image"),
        (image_file(configuration(config=SETTINGS, architecture="arm64")), "", "for arm64.*runs on amd64"),
    ],
)
def test_a_refused_file_never_reaches_the_engine(content: bytes, expected_id: str, why: str) -> None:
    engine = FakeEngine()
    with pytest.raises(InvalidRequestError, match=why):
        load(engine, content, expected_id)
    assert engine.loads == 0


def test_an_image_that_is_there_already_is_not_loaded_again() -> None:
    engine = FakeEngine()
    engine.put(image.tag(PRESENT), CONFIGURATION)
    assert load(engine, OURS) == OUR_ID
    assert engine.loads == 0


def test_another_build_of_the_same_sources_is_replaced() -> None:
    engine = FakeEngine()
    engine.put(image.tag(PRESENT), configuration(config=SETTINGS, created="earlier"))
    assert load(engine, OURS) == OUR_ID
    assert engine.loads == 1


def test_an_engine_that_names_images_otherwise_must_have_the_same_layers_and_settings() -> None:
    assert load(FakeEngine(names_by_manifest=True), OURS) == "sha256:" + "a" * 64
    for other in (
        configuration(config={**SETTINGS, "User": "0:0"}),
        configuration(config=SETTINGS, rootfs={"diff_ids": [digest(LAYERS[0])]}),
    ):
        with pytest.raises(EngineError, match="reported that it loaded"):
            load(FakeEngine(names_by_manifest=True, keeps=other.decode()), OURS)


def test_an_engine_that_has_something_else_afterwards_is_told_so() -> None:
    other = configuration(config=SETTINGS, rootfs={"diff_ids": []}).decode()
    with pytest.raises(EngineError, match="reported that it loaded"):
        load(FakeEngine(keeps=other), OURS)


def test_an_engine_that_hands_out_another_image_is_found_out() -> None:
    engine = FakeEngine()
    engine.put("other:1", configuration(config=SETTINGS, rootfs={"diff_ids": []}))
    wanted = engine.get("other:1").id
    sink = io.BytesIO()
    with pytest.raises(EngineError, match="handed out"):
        image_transfer.save(cast(docker.DockerClient, engine), wanted, sink, advance=lambda _: None)
    assert sink.getvalue() == b""


@pytest.mark.parametrize(
    "record",
    [
        b"[" * 100_000,
        b'{"python": "3.11", "packages": [7], "wheels": []}',
        b'{"python": "3.11", "packages": [{"name": "a"}], "wheels": []}',
        b"\xff",
    ],
)
def test_a_record_of_the_contents_that_makes_no_sense_counts_as_none(record: bytes) -> None:
    assert contents_of(record) is None


def test_the_record_of_the_contents_is_read() -> None:
    held = contents_of(
        b'{"python": "3.11.2", "packages": [{"name": "a", "version": "1", "architecture": "all"}],'
        b' "wheels": [{"file": "b.whl", "sha256": "00"}]}'
    )
    assert held is not None
    assert (held.python, held.packages[0].name, held.wheels[0].file) == ("3.11.2", "a", "b.whl")


def contents_of(record: bytes) -> image_transfer.Contents | None:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        member = tarfile.TarInfo(image_transfer.CONTENTS_PATH)
        member.size = len(record)
        tar.addfile(member, io.BytesIO(record))
    layers = (layer.getvalue(),)
    content = image_file(configuration(rootfs={"diff_ids": [digest(layers[0])]}), layers)
    # Also where the engine keeps layers compressed.
    packed = image_file(configuration(rootfs={"diff_ids": [digest(layers[0])]}), (gzip.compress(layers[0]),))
    found = []
    for file in (content, packed):
        with image_transfer.from_file(io.BytesIO(file)) as (spool, archived):
            found.append(image_transfer.contents(spool, archived))
    assert found[0] == found[1]
    return found[0]
