"""A file that somebody carried here is judged before an engine has seen a byte of it."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequestError
from orchestrator.sandbox import image_archive
from orchestrator.sandbox.image_archive import ArchivedImage

Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, len(content)
    return header, content


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for header, content in members:
            tar.addfile(header, io.BytesIO(content))
    return out.getvalue()


LAYERS = (tar_of([member("bin/sh", b"lower" * 500)]), tar_of([member("opt/a", b"upper")]))


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def configuration(**changes: Any) -> bytes:
    facts: dict[str, Any] = {
        "architecture": "amd64",
        "created": "2026-01-01T00:00:00Z",
        "config": {"Labels": {"rlm.source": "f" * 64}, "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in LAYERS]},
    }
    return json.dumps(facts | changes).encode()


def image_members(settings: bytes = b"", layers: tuple[bytes, ...] = LAYERS) -> Members:
    manifest = [
        {
            "Config": "c.json",
            "RepoTags": ["precious:latest"],
            "Layers": [f"{number}/layer.tar" for number in range(len(layers))],
        }
    ]
    return [
        *(member(f"{number}/layer.tar", layer) for number, layer in enumerate(layers)),
        member("c.json", settings or configuration()),
        member("manifest.json", json.dumps(manifest).encode()),
    ]


def image_file(settings: bytes = b"", layers: tuple[bytes, ...] = LAYERS) -> bytes:
    return tar_of(image_members(settings, layers))


def opened(content: bytes) -> tuple[io.BytesIO, ArchivedImage]:
    spool = io.BytesIO()
    image_archive.unpack(iter([content[:1000], content[1000:]]), spool, lambda _: None)
    return spool, image_archive.read(spool)


def refused(content: bytes, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        opened(content)


def test_the_id_is_the_hash_of_the_configuration() -> None:
    _, image = opened(image_file())
    assert image.image_id == digest(configuration())
    assert image.diff_ids == [digest(layer) for layer in LAYERS]
    assert (image.label("rlm.source"), image.architecture) == ("f" * 64, "amd64")


def test_compressed_or_not_it_is_the_same_image() -> None:
    assert opened(gzip.compress(image_file()))[1] == opened(image_file())[1]


def test_a_layer_that_was_kept_compressed_is_known_by_what_is_in_it() -> None:
    _, image = opened(image_file(layers=tuple(gzip.compress(layer) for layer in LAYERS)))
    assert image.diff_ids == [digest(layer) for layer in LAYERS]
    assert image.size_bytes == sum(map(len, LAYERS))


def test_an_archive_of_ours_holds_the_same_image_under_our_tag_alone() -> None:
    spool, image = opened(image_file(layers=tuple(gzip.compress(layer) for layer in LAYERS)))
    written = b"".join(image_archive.archive(image, spool, tag="rlm-sandbox:0123"))
    assert b"precious" not in written
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        manifest = tar.extractfile("manifest.json")
        assert manifest is not None
        assert json.load(manifest)[0]["RepoTags"] == ["rlm-sandbox:0123"]
    again, same = opened(written)
    assert (same.image_id, same.diff_ids) == (image.image_id, image.diff_ids)
    assert b"".join(image_archive.layer_bytes(again, same.layers[0])) == LAYERS[0]


def test_one_image_has_one_file() -> None:
    files = []
    for source in (image_file(), tar_of(reversed(image_members()))):
        spool, image = opened(source)
        sink = io.BytesIO()
        image_archive.compressed(image_archive.archive(image, spool, tag="t:1"), sink, lambda _: None)
        files.append(sink.getvalue())
    assert files[0] == files[1]


def test_a_layer_that_is_there_twice_is_written_once() -> None:
    doubled = configuration(rootfs={"diff_ids": [digest(LAYERS[0])] * 2})
    spool, image = opened(image_file(doubled, (LAYERS[0], LAYERS[0])))
    again, same = opened(b"".join(image_archive.archive(image, spool, tag="t:1")))
    assert same.diff_ids == image.diff_ids
    assert len(again.getvalue()) < len(image_file(doubled, (LAYERS[0], LAYERS[0])))


def test_a_file_in_the_image_is_found_in_its_topmost_layer() -> None:
    spool, image = opened(image_file())
    assert image_archive.file_in(spool, image, "opt/a") == b"upper"
    assert image_archive.file_in(spool, image, "opt/b") is None


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@given(share=st.floats(min_value=0, max_value=0.999))
def test_a_file_that_is_cut_off_anywhere_is_refused(compress: Any, share: float) -> None:
    # Of the end marker's zeros, one block is enough.
    whole = compress(image_file().rstrip(b"\0") + bytes(512))
    with pytest.raises(InvalidRequestError):
        opened(whole[: int(len(whole) * share)])


@given(st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(data: st.DataObject) -> None:
    content = bytearray(image_file())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        _, image = opened(bytes(content))
    except InvalidRequestError:
        return
    # What is left are bytes that nothing reads, and the configuration: that makes another image of it.
    assert image.diff_ids == [digest(layer) for layer in LAYERS]
    assert image.image_id == digest(image.configuration)


@given(st.binary(max_size=2_000))
def test_what_is_no_archive_is_refused_and_never_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        opened(content)


def test_a_file_of_another_kind_is_named_as_such() -> None:
    refused(b"", "it is empty")
    refused(b"A letter to the operator.\n" * 100, "nothing that `rlm image save` writes")
    refused(tar_of([member("letter.txt", b"Dear operator")]), "nothing that `rlm image save` writes")
    refused(gzip.compress(b"letter"), "nothing that `rlm image save` writes")


@pytest.mark.parametrize(
    "kind",
    [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_LONGNAME, b"S"],
)
def test_what_an_image_archive_has_no_use_for_is_refused(kind: bytes) -> None:
    refused(tar_of([*image_members(), member("0/layer", kind=kind)]), "neither a file nor a folder")


@pytest.mark.parametrize("record", [b"30 path=manifest.json\n", b"20 size=1\n", b"25 GNU.sparse.name=x\n"])
def test_an_extension_that_renames_or_resizes_is_refused(record: bytes) -> None:
    refused(tar_of([member("x", record, tarfile.XHDTYPE), *image_members()]), "neither a file nor a folder")


def test_an_extension_that_only_tells_a_time_is_skipped() -> None:
    tar = tar_of([member("x", b"22 mtime=1700000000.5\n", tarfile.XHDTYPE), *image_members()])
    assert opened(tar)[1] == opened(tar)[1]


def test_two_files_of_one_name_are_refused() -> None:
    refused(tar_of([*image_members(), member("c.json", b"{}")]), "two files of one name")


def test_several_images_in_one_file_are_refused() -> None:
    entry = {"Config": "c.json", "Layers": []}
    members = [
        member("c.json", configuration()),
        member("manifest.json", json.dumps([entry, entry]).encode()),
    ]
    refused(tar_of(members), "does not name one image")


@pytest.mark.parametrize("size", ["77777777777\0", "-0000000001\0", "\xff" * 12])
def test_a_size_beyond_the_end_or_below_zero_is_refused(size: str) -> None:
    header, content = member("c.json", b"{}")
    block = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.encode("latin-1")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    refused(bytes(block) + content + bytes(2048), "cut off|nothing that")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 100_000, "manifest is not JSON"),
        (b"{}", "does not name one image"),
        (b'[{"Config": 1, "Layers": []}]', "does not name one image"),
        (b'[{"Config": "none", "Layers": []}]', "configuration is missing"),
        (b'[{"Config": "c.json", "Layers": []}]', "another number of layers"),
        (b'[{"Config": "c.json", "Layers": ["../../etc/passwd", 7]}]', "a layer is missing"),
        (b" " * (1024 * 1024 + 1), "description is too large"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(content: bytes, why: str) -> None:
    refused(tar_of([member("c.json", configuration()), member("manifest.json", content)]), why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"rootfs": {"diff_ids": [digest(b"other"), digest(LAYERS[1])]}},
            "not the one that its configuration",
        ),
        ({"rootfs": {"diff_ids": [None, None]}}, "not the one that its configuration"),
        ({"rootfs": []}, "not that of an image"),
        ({"config": None}, "not that of an image"),
        ({"architecture": 7}, "not that of an image"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Any], why: str) -> None:
    refused(image_file(configuration(**changes)), why)


def test_a_file_that_inflates_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_archive, "MAX_IMAGE_BYTES", 1_000_000)
    spool = io.BytesIO()
    with pytest.raises(InvalidRequestError, match="larger than"):
        image_archive.unpack([gzip.compress(bytes(5_000_000))], spool, lambda _: None)
    assert len(spool.getvalue()) <= 1_000_000


def test_a_layer_that_inflates_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_archive, "MAX_IMAGE_BYTES", 1_000_000)
    refused(image_file(layers=(gzip.compress(bytes(5_000_000)), LAYERS[1])), "larger than")


def test_an_archive_of_endless_members_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_archive, "_MAX_ENTRIES", 20)
    refused(tar_of(member(f"{number}") for number in range(21)), "more than 20 members")


def test_a_label_is_text_or_nothing() -> None:
    nonsense: list[Any] = [None, [], {"rlm.source": 7}, {}]
    for labels in nonsense:
        _, image = opened(image_file(configuration(config={"Labels": labels})))
        assert image.label("rlm.source") == ""
