"""The context as a cell sees it, from the files the host staged."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from rlm_proto.v1 import sandbox_pb2

from sandbox_image.worker.interpreter.files import FileMap
from sandbox_image.worker.interpreter.staged import StagingError, open_context
from sandbox_image.worker.interpreter.text import TextView
from tests.unit.worker import host


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


@pytest.mark.parametrize("change", [{"version": 2}, {"kind": "other"}])
def test_what_this_image_does_not_understand_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    host.stage(tmp_path, "text")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(StagingError):
        open_context(tmp_path, 1000)


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
