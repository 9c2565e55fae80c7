"""The context as a cell sees it, from the files the host staged."""

import asyncio
import shutil
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_proto.v1 import sandbox_pb2

from orchestrator.contexts.guest_form import encode_manifest
from orchestrator.contexts.manifest import Entry, Manifest, Measured
from sandbox_image.worker.interpreter.catalogue import Catalogue, StagingError
from sandbox_image.worker.interpreter.files import FileMap
from sandbox_image.worker.interpreter.staged import open_context
from sandbox_image.worker.interpreter.text import TextView
from tests.unit.worker import host


def _is_utf8(text: str) -> bool:
    return text.isprintable() or text.encode("utf-8", "replace").decode() == text


@pytest.mark.parametrize("text", ["", "plain", "é\r\n", "漢", "\U0001f600" * 100])
def test_a_text_that_fits_is_a_str(tmp_path: Path, text: str) -> None:
    host.stage(tmp_path, text)
    assert open_context(tmp_path, 400).value == text
    assert type(open_context(tmp_path, 400).value) is str


def test_characters_times_width_decide_what_fits(tmp_path: Path) -> None:
    host.stage(tmp_path, "a" * 99 + "\U0001f600")
    assert isinstance(open_context(tmp_path, 400).value, str)
    assert isinstance(open_context(tmp_path, 399).value, TextView)


def test_files_are_a_mapping_that_reads_on_touch(tmp_path: Path) -> None:
    files = {f"dir/{number:03}.txt": f"file é {number}" for number in range(100)} | {"big.txt": "x" * 5000}
    host.stage(tmp_path, files)
    context = open_context(tmp_path, 1000).value
    assert isinstance(context, FileMap)
    assert len(context) == 101
    assert list(context) == list(files)
    assert context["dir/007.txt"] == "file é 7"
    assert context["dir/007.txt"] is context["dir/007.txt"]
    assert isinstance(context["big.txt"], TextView)
    assert {path: str(context[path]) for path in files if path != "big.txt"} == {
        path: text for path, text in files.items() if path != "big.txt"
    }
    assert list(context[:2]) == ["dir/000.txt", "dir/001.txt"]
    assert list(context[-2:]) == ["dir/099.txt", "big.txt"]
    assert list(context.subset(["big.txt"])) == ["big.txt"]
    assert "absent" not in context
    assert repr(context).startswith("<FileMap of 101 files, ")
    assert "91 more" in repr(context)
    with pytest.raises(KeyError, match="files are found by path"):
        _ = context[0]  # type: ignore[call-overload]
    with pytest.raises(KeyError):
        context.subset(["absent"])


def test_a_text_of_the_context_is_known_by_identity_while_it_is_kept(tmp_path: Path) -> None:
    host.stage(tmp_path, {"a": "same", "b": "same", "c": "x" * 10})
    context = open_context(tmp_path, 10).value
    assert isinstance(context, FileMap)
    text = context["b"]
    assert isinstance(text, str)
    assert context.path_of(text) == ("b", 4)
    assert context.path_of("".join(["sa", "me"])) is None
    _ = context["c"]
    assert context.path_of(text) is None


@pytest.mark.parametrize(("at", "what"), [(0, b"{"), (7, b"\x03"), (8, b"\x02")])
def test_a_manifest_of_another_form_version_or_kind_is_refused(tmp_path: Path, at: int, what: bytes) -> None:
    host.stage(tmp_path, "text")
    manifest = bytearray((tmp_path / "manifest").read_bytes())
    manifest[at : at + 1] = what
    (tmp_path / "manifest").chmod(0o600)
    (tmp_path / "manifest").write_bytes(manifest)
    with pytest.raises(StagingError):
        open_context(tmp_path, 1000)


@given(
    paths=st.lists(st.text(min_size=1, max_size=4).filter(_is_utf8), unique=True, max_size=12),
    asked=st.text(max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_a_file_is_found_by_its_path_in_whatever_order_the_files_are(
    paths: list[str], asked: str, order: Random
) -> None:
    catalogue = _catalogue(paths)
    assert [catalogue.path(number) for number in range(len(catalogue))] == paths
    for path in [*order.sample(paths, len(paths)), *paths, *paths[::2]]:
        assert catalogue.find(path) == paths.index(path)
    assert catalogue.find(asked) == (paths.index(asked) if asked in paths else None)


def test_the_runs_of_some_files_name_them_in_their_order(tmp_path: Path) -> None:
    host.stage(tmp_path, {f"{number}": "x" for number in range(10)})
    context = open_context(tmp_path, 1000).value
    assert isinstance(context, FileMap)
    assert context.runs() == [(0, 10)]
    assert context[3:6].runs() == [(3, 3)]
    assert context[6:3].runs() == []
    assert context[::-4].runs() == [(9, 1), (5, 1), (1, 1)]
    assert context.subset(["7", "8", "1", "2", "3", "9"]).runs() == [(7, 2), (1, 3), (9, 1)]
    part = context.subset(["7", "1"])
    assert list(part) == ["7", "1"]
    assert "2" not in part
    with pytest.raises(KeyError):
        _ = part["2"]


def _catalogue(paths: list[str]) -> Catalogue:
    entries = tuple(Entry(path, 0, Measured(0, 0, 0, 1, 0, "")) for path in paths)
    return Catalogue(memoryview(encode_manifest(Manifest("files", entries, 0, ""))))


async def test_a_large_text_in_a_cell() -> None:
    lease = sandbox_pb2.Lease()
    lease.CopyFrom(host.LEASE)
    lease.max_str_bytes = 1000
    text = "".join(f"line {number} é\n" for number in range(1000))
    async with host.started(text, lease) as mine:
        ended = await mine.run(
            "len(context), context[-7:], context.line_range(500, 501), 'line 999 é' in context"
        )
        assert ended.text == f"({len(text)}, {text[-7:]!r}, ['line 500 é'], True)\n"
        assert "<TextView of" in (await mine.run("context")).text
        assert (await mine.run("FINAL(context)")).answer.decode() == text


async def test_a_worker_that_finds_no_context_ends() -> None:
    async with host.started() as one:
        shutil.rmtree(one.context_dir)
        one.start("import os; os._exit(1)")
        assert await asyncio.wait_for(one.process.wait(), 10) == 1
