"""Ingest of what somebody made to hurt: archives, and trees that change while they are read (B04, B05, B15).

Nothing here needs a container: what is shown is that none is needed for a path to lead nowhere.
"""

import gzip
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.contexts import archives
from orchestrator.errors import ContextInputError
from tests.unit.contexts.archives import (
    TAR_END,
    Stage,
    assert_refused,
    header,
    member,
    padded,
    staging,
    tar_of,
    write_tar,
    zip_of,
)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staging(tmp_path) as stage_paths:
        yield stage_paths


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.case("B05")
@pytest.mark.parametrize(
    "name", ["../canary", "a/../../canary", "/etc/passwd", "..", "//x", "./../x", "a/.."]
)
def test_a_name_that_leads_out_of_the_archive_refuses_all_of_it(
    stage: Stage, tmp_path: Path, name: str
) -> None:
    assert_refused(stage, tar_of(tmp_path / "x.tar", {"fine": b"1", name: b"2"}), "leads out of it")
    assert_refused(stage, zip_of(tmp_path / "x.zip", {"fine": b"1", name: b"2"}), "leads out of it")
    link = member(name, kind=tarfile.SYMTYPE, target="x")
    assert_refused(stage, write_tar(tmp_path / "y.tar", [member("fine", b"1"), link]), "leads out of it")


@pytest.mark.case("B05")
def test_a_name_that_is_too_long_or_empty_or_has_a_nul_refuses_the_archive(
    stage: Stage, tmp_path: Path
) -> None:
    assert_refused(stage, tar_of(tmp_path / "x.tar", {"d/" * 2_100 + "x": b"1"}), "more than 4,096 bytes")
    assert_refused(stage, tar_of(tmp_path / "y.tar", {"": b"1"}), "damaged")
    info, content = member("a", b"1")
    info.pax_headers = {"path": "a\0b"}
    assert_refused(stage, write_tar(tmp_path / "z.tar", [(info, content)]), "leads out of it")


@pytest.mark.case("B05")
@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("content", [b"", b"no archive at all\n" * 100, b"\0" * 10_000, b"\x1f\x8b\x08" * 99])
def test_what_is_no_archive_is_refused_by_its_name(
    stage: Stage, tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)

    with pytest.raises(ContextInputError, match=r"damaged, cut off, or no archive|no regular file"):
        stage(path)


@pytest.mark.case("B05")
@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_cut_off_anywhere_isassert_refused(stage: Stage, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    files = {"a": os.urandom(3_000), "b": os.urandom(600)}
    whole = (
        zip_of(path, files)
        if suffix == "zip"
        else tar_of(path, files, compression=suffix.removeprefix("tar").removeprefix("."))
    ).read_bytes()
    # Behind its end mark a tar is only padding; the other forms have an end of their own.
    length = 512 + 3_072 + 512 + 1_024 if suffix == "tar" else len(whole)
    for cut in (1, 400, 512, 1_000, 3_584, 3_600, 4_096, length - 1):
        path.write_bytes(whole[: min(cut, length - 1)])
        with pytest.raises(ContextInputError, match="damaged"):
            stage(path)


def test_an_encrypted_zip_isassert_refused(stage: Stage, tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"x": b"y"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)

    assert_refused(stage, path, "it is encrypted")


def test_a_compression_nobody_can_read_isassert_refused(stage: Stage, tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"x": b"y"})
    raw = bytearray(path.read_bytes())
    raw[8] = raw[raw.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(raw)

    assert_refused(stage, path, "compressed in a way")
    assert_refused(stage, tar_of(tmp_path / "x.tar.zst", {"x": b"y"}), "zstd is not supported")


def test_an_archive_without_a_file_isassert_refused(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ContextInputError, match="no regular file"):
        stage(write_tar(tmp_path / "x.tar", [member("dir", kind=tarfile.DIRTYPE)]))
    with pytest.raises(ContextInputError, match="no regular file"):
        stage(write_tar(tmp_path / "y.tar", []))


# --- Bombs -------------------------------------------------------------------------------------------------


@pytest.fixture
def little_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_GROWTH_BYTES", 1_000_000)


@pytest.mark.case("B05")
@pytest.mark.usefixtures("little_growth")
@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_what_grows_too_much_is_refused_before_it_is_read(stage: Stage, tmp_path: Path, suffix: str) -> None:
    zeros = {"zeros": bytes(50_000_000)}
    path = tmp_path / f"x.{suffix}"
    if suffix == "zip":
        zip_of(path, zeros)
    else:
        tar_of(path, zeros, compression=suffix.removeprefix("tar."))

    assert_refused(stage, path, "would grow to more than")


@pytest.mark.case("B05")
@pytest.mark.usefixtures("little_growth")
def test_many_small_members_grow_like_a_large_one(stage: Stage, tmp_path: Path) -> None:
    files = {f"f{number}": bytes(100_000) for number in range(300)}

    assert_refused(stage, tar_of(tmp_path / "x.tar.xz", files, compression="xz"), "would grow to more than")


@pytest.mark.case("B05")
def test_overlapping_members_of_a_zip_count_as_often_as_they_are_named(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE_GROWTH_BYTES", 1_000_000)
    raw = zip_of(tmp_path / "one.zip", {"x": bytes(900_000)}).read_bytes()
    start = raw.index(b"PK\x01\x02")
    end = raw.index(b"PK\x05\x06")
    local, entry = raw[:start], raw[start:end]
    directory = entry * 50
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 50, 50, len(directory), start, 0)
    path = tmp_path / "x.zip"
    path.write_bytes(local + directory + tail)

    # A newer Python sees the overlap by itself.
    assert_refused(stage, path, "would grow to more than|damaged")


@pytest.mark.case("B05")
def test_a_sparse_file_that_claims_the_world_isassert_refused(stage: Stage, tmp_path: Path) -> None:
    info, _ = member("sparse")
    info.pax_headers = {
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(1 << 50),
        "GNU.sparse.name": "sparse",
    }
    assert_refused(stage, write_tar(tmp_path / "x.tar", [(info, b"")]), "would grow to more than")


@pytest.mark.case("B05")
@pytest.mark.parametrize("kind", [b"0", b"5", b"L", b"K", b"x", b"g", b"2", b"Z"])
def test_a_negative_size_is_refused_and_not_followed(stage: Stage, tmp_path: Path, kind: bytes) -> None:
    # Base 256, minus 512: back to the very header that says so.
    minus = b"\xff" * 10 + b"\xfe\x00"
    path = tmp_path / "x.tar"
    path.write_bytes(
        header("x", size=1) + padded(b"1") + header("y", kind=kind, raw_size=minus) * 3 + TAR_END
    )

    assert_refused(stage, path, "damaged|longer than any honest one")


@pytest.mark.case("B05")
@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_header_as_long_as_memory_is_not_read(stage: Stage, tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(header("y", size=1 << 32, kind=kind))
        file.write(bytes(10_000_000))

    assert_refused(stage, path, "longer than any honest one")


@pytest.mark.case("B05")
def test_a_zip_whose_directory_is_longer_than_any_honest_one_is_not_read(
    stage: Stage, tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *([0] * 9), 1, *([0] * 6)) + b"x"
    directory = entry * 750_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0, 0)
    path.write_bytes(directory + tail)

    assert_refused(stage, path, "longer than any honest one")


@pytest.mark.case("B05")
def test_headers_of_headers_of_headers_areassert_refused(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes((header("y", size=2, kind=b"L") + padded(b"n\0")) * 100_000 + TAR_END)

    assert_refused(stage, path, "damaged")


@pytest.mark.case("B05")
def test_more_members_than_a_context_may_have_are_refused(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 100)
    directories = [member(f"d{number}", kind=tarfile.DIRTYPE) for number in range(101)]

    assert_refused(stage, write_tar(tmp_path / "x.tar", directories), "more than 100 members")
    assert_refused(
        stage, zip_of(tmp_path / "x.zip", {f"f{i}": b"1" for i in range(101)}), "more than 100 members"
    )


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_stream_that_breaks_in_the_middle_of_a_member_is_refused(
    stage: Stage, tmp_path: Path, suffix: str
) -> None:
    path = tar_of(tmp_path / f"x.tar.{suffix}", {"x": os.urandom(100_000)}, compression=suffix)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)

    assert_refused(stage, path, "damaged")
