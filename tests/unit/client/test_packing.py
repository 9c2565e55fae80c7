"""What is uploaded of paths."""

import asyncio
import hashlib
import os
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest

from orchestrator.client import packing
from orchestrator.client.packing import Packed, packed, packed_bytes
from orchestrator.contexts.store import ContextStore
from orchestrator.errors import ContextInputError, MachineError
from orchestrator.ids import TenantId


def content(ready: Packed) -> bytes:
    return ready.read(0, ready.length_bytes + 1)


async def names(*paths: Path) -> list[str]:
    async with packed(paths) as ready:
        ready.file.seek(0)
        with tarfile.open(fileobj=ready.file, mode="r:") as archive:
            return archive.getnames()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name in ("b.txt", "a/z.txt", "a.txt", ".hidden"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


async def test_a_file_goes_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "logs.zip"
    file.write_bytes(b"PK whatever")
    async with packed([file]) as ready:
        assert content(ready) == b"PK whatever"
        assert ready.name == "logs.zip"
        assert ready.sha256 == hashlib.sha256(b"PK whatever").hexdigest()


async def test_a_directorys_files_are_named_from_it_on_in_the_order_of_their_bytes(tree: Path) -> None:
    assert await names(tree) == [".hidden", "a.txt", "a/z.txt", "b.txt"]


async def test_several_paths_are_named_from_the_directory_that_holds_all_of_them(
    tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("other")
    assert await names(tree / "a", tmp_path / "other.txt") == ["other.txt", "tree/a/z.txt"]


async def test_links_and_pipes_are_left_out_and_named(tree: Path) -> None:
    (tree / "link.txt").symlink_to(tree / "b.txt")
    (tree / "up").symlink_to(tree.parent)
    os.mkfifo(tree / "pipe\x1b[2J")
    async with packed([tree]) as ready:
        assert len(ready.notes) == 3
        assert not any("\x1b" in note for note in ready.notes)
    assert await names(tree) == [".hidden", "a.txt", "a/z.txt", "b.txt"]


async def test_the_path_that_was_asked_for_may_be_a_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(tree)
    assert ".hidden" in await names(tmp_path / "way")


async def test_notes_are_counted_from_some_number_on(tree: Path) -> None:
    for number in range(packing.MAX_NOTES + 7):
        (tree / f"link{number}").symlink_to("nowhere")
    async with packed([tree]) as ready:
        assert len(ready.notes) == packing.MAX_NOTES + 1
        assert ready.notes[-1] == "7 more notes like these"


async def test_a_name_that_is_no_text_goes_into_the_archive_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9")).write_text("x")
    assert [os.fsencode(name) for name in await names(folder)] == [b"caf\xe9"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain.txt", "plain.txt"),
        ("two\nlines\x1b.txt", "two_lines_.txt"),
        (os.fsdecode(b"caf\xe9.txt"), "caf_.txt"),
        ("é" * 200 + ".tar.gz", "é" * 124 + ".tar.gz"),
    ],
)
async def test_a_context_has_a_printable_name_whose_end_is_kept(name: str, shown: str) -> None:
    async with packed_bytes(b"x", name) as ready:
        assert ready.name == shown
        assert len(ready.name.encode()) <= packing.MAX_NAME_BYTES


async def test_what_cannot_be_asked_about_is_refused_with_its_path(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "two.zip").touch()
    os.mkfifo(tmp_path / "pipe")
    for paths, why in (
        ([], "no context was given"),
        ([tmp_path / "none"], "'.*none' cannot be read: No such file"),
        ([tmp_path / "empty.txt"], "empty.txt' is empty"),
        ([tmp_path / "nothing"], "no regular file in '.*nothing'"),
        ([tmp_path / "pipe"], "neither a file nor a directory"),
        ([tree, tmp_path / "two.zip"], "two.zip' is an archive"),
        ([tree, tree / "b.txt"], "is given twice"),
    ):
        with pytest.raises(ContextInputError, match=why):
            async with packed(paths):
                pass


async def test_a_full_disk_is_told_with_what_to_do(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(MachineError, match="TMPDIR names another place"):
        async with packed([tree]):
            pass


async def test_packing_that_is_cancelled_stops_and_leaves_nothing_open(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_go_on = threading.Event(), threading.Event()
    add = packing._add

    def slow(*arguments: object) -> bool:
        began.set()
        assert may_go_on.wait(30)
        return add(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_add", slow)
    before = len(os.listdir("/proc/self/fd"))
    packs = packed([tree])
    task = asyncio.create_task(packs.__aenter__())
    await asyncio.to_thread(began.wait, 30)
    task.cancel()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_server_reads_from_it_what_a_run_without_a_server_would(tree: Path, tmp_path: Path) -> None:
    (tree / os.fsdecode(b"caf\xe9")).write_text("odd")
    (tree / "link.txt").symlink_to(tree / "b.txt")
    (tree / ("long" * 40)).write_text("long name")
    store, tenant = ContextStore(tmp_path / "store"), TenantId("t")
    try:
        here = await asyncio.to_thread(store.stage_paths, tenant, [tree])
        async with packed([tree]) as ready:
            sent = tmp_path / ready.name
            sent.write_bytes(content(ready))
        there = await asyncio.to_thread(store.stage_paths, tenant, [sent])
        assert there.content_id == here.content_id
    finally:
        store.close()
