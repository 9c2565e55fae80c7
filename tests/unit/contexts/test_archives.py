import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.contexts import archive_reader, archives
from orchestrator.errors import ContextInputError, RunCancelledError
from tests.unit.contexts.archives import (
    TAR_END,
    Stage,
    assert_refused,
    member,
    staging,
    tar_of,
    texts,
    write_tar,
    zip_of,
)

FILES = {"proj/b": b"bee\n", "proj/a.txt": "größer\n".encode(), "proj/a/c": b"sea", "top": b""}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staging(tmp_path) as stage_paths:
        yield stage_paths


# --- What becomes what -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "compression"),
    [
        (".tar", ""),
        (".tar.gz", "gz"),
        (".tgz", "gz"),
        (".tar.bz2", "bz2"),
        (".tbz2", "bz2"),
        (".tar.xz", "xz"),
        (".TXZ", "xz"),
        (".zip", None),
    ],
)
def test_the_members_of_an_archive_are_files_of_the_context(
    stage: Stage, tmp_path: Path, suffix: str, compression: str | None
) -> None:
    path = tmp_path / f"data{suffix}"
    archive = zip_of(path, FILES) if compression is None else tar_of(path, FILES, compression=compression)

    context = stage(archive)

    assert context.manifest.kind == "files"
    assert list(texts(context).items()) == sorted(FILES.items(), key=lambda item: item[0].encode())
    assert context.notes == ()


def test_an_archive_makes_the_same_context_as_its_directory(stage: Stage, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        tar.add(tmp_path / "tree", arcname=".")

    assert stage(tmp_path / "tree.tar").content_id == stage(tmp_path / "tree").content_id


def test_among_several_paths_the_archive_is_a_directory(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x")

    context = stage(tar_of(tmp_path / "old.tar", {"log": b"y"}), tmp_path / "log")

    assert texts(context) == {"log": b"x", "old.tar/log": b"y"}


def test_an_archive_in_a_directory_or_in_an_archive_is_a_file_like_any_other(
    stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    inner = zip_of(tmp_path / "tree" / "inner.zip", {"x": b"y"})
    outer = tar_of(tmp_path / "outer.tar", {"inner.zip": inner.read_bytes()})

    assert list(texts(stage(tmp_path / "tree"))) == ["inner.zip"]
    assert list(texts(stage(outer))) == ["inner.zip"]


def test_a_link_to_an_archive_is_one_whatever_the_link_is_called(stage: Stage, tmp_path: Path) -> None:
    tar_of(tmp_path / "v2.tar", {"x": b"y"})
    (tmp_path / "current").symlink_to("v2.tar")

    assert texts(stage(tmp_path / "current")) == {"x": b"y"}


@pytest.mark.parametrize("name", ["report.docx", "tar", ".zip", "zip.txt", "x.gz"])
def test_any_other_name_stands_for_a_text(name: str) -> None:
    assert archives.form_of(b"/some/where/" + name.encode()) is None


def test_names_are_normalised_and_weird_ones_are_text(stage: Stage, tmp_path: Path) -> None:
    weird = {"./a//b": b"1", "new\nline\x1b[2J": b"2", "caf\udce9": b"3", "back\\..\\slash": b"4"}

    context = stage(tar_of(tmp_path / "x.tar", weird))

    assert texts(context) == {
        "a/b": b"1",
        "back\\..\\slash": b"4",
        "caf\\xe9": b"3",
        "new\nline\x1b[2J": b"2",
    }
    assert context.notes == ("a file name is not UTF-8; it is called 'caf\\xe9'",)


def test_zip_names_are_read_as_utf8_where_they_are_and_as_code_page_437_where_not(
    stage: Stage, tmp_path: Path
) -> None:
    path = zip_of(tmp_path / "x.zip", {"aaaa": b"1", "bb": b"2", "größe": b"3"})
    raw = path.read_bytes().replace(b"aaaa", "éé".encode()).replace(b"bb", b"\x81\x82")
    path.write_bytes(raw)

    assert texts(stage(path)) == {"éé": b"1", "üé": b"2", "größe": b"3"}


def test_of_two_members_of_one_name_the_last_counts(stage: Stage, tmp_path: Path) -> None:
    twice = [member("x", b"old"), member("y", b"other"), member("./x", b"new")]

    context = stage(write_tar(tmp_path / "x.tar", twice))

    assert texts(context) == {"x": b"new", "y": b"other"}
    assert context.notes == ("'x' is in the archive more than once; the last one counts",)


def test_a_text_of_an_archive_that_is_not_utf8_is_named(stage: Stage, tmp_path: Path) -> None:
    context = stage(tar_of(tmp_path / "x.tar", {"z": b"fine", "bin": b"ab\xff"}))

    (note,) = context.notes
    assert note.endswith("replaced by U+FFFD once, first at byte 2 of 'bin'")


# --- What is left out --------------------------------------------------------------------------------------


@pytest.mark.case("B05")
def test_links_pipes_and_devices_of_a_tar_are_left_out_and_named(stage: Stage, tmp_path: Path) -> None:
    hostile = [
        member("link", kind=tarfile.SYMTYPE, target="/etc/passwd"),
        member("link/passwd", b"through a link of the archive's own"),
        member("up", kind=tarfile.SYMTYPE, target="../canary"),
        member("hard", kind=tarfile.LNKTYPE, target="../canary"),
        member("pipe", kind=tarfile.FIFOTYPE),
        member("zero", kind=tarfile.CHRTYPE),
        member("disk", kind=tarfile.BLKTYPE),
        member("dir", kind=tarfile.DIRTYPE),
    ]

    context = stage(write_tar(tmp_path / "x.tar", hostile))

    assert texts(context) == {"link/passwd": b"through a link of the archive's own"}
    assert sorted(context.notes) == [
        "'disk' was left out: it is a device",
        "'hard' was left out: it is a hard link",
        "'link' was left out: it is a symbolic link",
        "'pipe' was left out: it is a named pipe",
        "'up' was left out: it is a symbolic link",
        "'zero' was left out: it is a device",
    ]


@pytest.mark.case("B05")
def test_links_of_a_zip_are_left_out_and_named(stage: Stage, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16

    context = stage(zip_of(tmp_path / "x.zip", [(link, b"../canary"), ("x", b"y"), ("dir/", b"")]))

    assert texts(context) == {"x": b"y"}
    assert context.notes == ("'link' was left out: it is a symbolic link",)


@pytest.mark.case("B05")
def test_a_long_path_of_links_leads_nowhere(stage: Stage, tmp_path: Path) -> None:
    # The shape of CVE-2025-4517: links whose joined length makes a resolver give up half-way.
    deep = "d" * 247
    steps = [member(deep, kind=tarfile.DIRTYPE), member("a", kind=tarfile.SYMTYPE, target=deep)]
    escape = "/".join(["a"] * 16) + "/" + "l" * 254
    steps += [member(escape, kind=tarfile.SYMTYPE, target="../" * 16), member("x", b"y")]

    assert texts(stage(write_tar(tmp_path / "x.tar", steps))) == {"x": b"y"}


# --- The process that reads it -----------------------------------------------------------------------------


def _played_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> Path:
    """A reader process that does what `program` says, and an archive for it."""
    script = tmp_path / "played.py"
    script.write_text("import os, struct, sys, time\nout = sys.stdout.buffer\n" + program)
    monkeypatch.setattr(archive_reader, "__file__", str(script))
    path = tmp_path / "x.tar"
    path.write_bytes(b"whatever")
    return path


_FRAME = "frame = lambda kind, body: out.write(struct.pack('>cI', kind, len(body)) + body)\n"


@pytest.mark.case("B05")
@pytest.mark.parametrize(
    "program",
    [
        "",
        "out.write(b'F')",
        "out.write(struct.pack('>cI', b'D', 1 << 31)); out.flush(); time.sleep(600)",
        "os.kill(os.getpid(), 9)",
        _FRAME + "frame(b'D', b'data of no file')",
        _FRAME + "frame(b'D', b'')",
        _FRAME + "frame(b'F', b'short')",
        _FRAME + "frame(b'F', struct.pack('>q', -1) + b'x')",
        _FRAME + "frame(b'F', struct.pack('>q', 1) + b'x'); frame(b'D', b'too much')",
        _FRAME + "frame(b'F', struct.pack('>q', 1) + b'x'); frame(b'E', b'')",
        _FRAME + "frame(b'F', struct.pack('>q', 1) + b'x'); frame(b'L', b'sy'); frame(b'D', b'1')",
        _FRAME + "frame(b'F', struct.pack('>q', 1) + b'../x')",
        _FRAME + "frame(b'L', b'')",
        _FRAME + "frame(b'L', b'!x')",
        _FRAME + "frame(b'R', b'whatever it says')",
        _FRAME + "frame(b'\\xff', b'')",
    ],
)
def test_a_reader_that_was_taken_over_can_say_nothing_but_an_archive(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    path = _played_by(monkeypatch, tmp_path, program)

    assert_refused(stage, path, "cannot be read|leads out of it")


@pytest.mark.case("B05")
def test_a_reader_that_says_nothing_is_ended(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "SILENCE_S", 0.3)

    assert_refused(stage, _played_by(monkeypatch, tmp_path, "time.sleep(600)"), "nothing came out of it")


def test_cancelling_ends_the_reader_while_it_says_nothing(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _played_by(monkeypatch, tmp_path, "time.sleep(600)")
    looks = iter([False, False, False, True])

    with pytest.raises(RunCancelledError):
        stage(path, cancelled=lambda: next(looks))


@pytest.mark.case("B05")
def test_the_reader_has_no_key_no_directory_and_no_rights(tmp_path: Path) -> None:
    program = (
        "import importlib.util, os, sys\n"
        f"spec = importlib.util.spec_from_file_location('reader', {archive_reader.__file__!r})\n"
        "reader = importlib.util.module_from_spec(spec); spec.loader.exec_module(reader)\n"
        "reader._give_up_rights(0)\n"
        "file = int(sys.argv[1])\n"
        "attempts = lambda: open('/etc/hostname'), lambda: os.write(file, b'x'), lambda: bytearray(2 << 30)\n"
        "for attempt in attempts:\n"
        "    try:\n"
        "        attempt(); print('reached')\n"
        "    except (OSError, MemoryError) as error:\n"
        "        print(type(error).__name__)\n"
    )
    with open(tmp_path / "out", "wb") as file:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program, str(file.fileno())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            pass_fds=(file.fileno(),),
            check=False,
        )
    assert done.stdout.split() == ["OSError", "OSError", "MemoryError"], done.stderr


def test_the_reader_stands_on_the_standard_library_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", archive_reader.__file__, "tar"],
        input=TAR_END,
        capture_output=True,
        check=False,
    )
    # A pipe is no file, and it does not ask for one: it only reads forward.
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"E\0\0\0\0")


def test_the_environment_of_the_reader_is_empty(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the canary key")
    # CPython sets LC_CTYPE by itself where there is no locale.
    program = (
        _FRAME + "names = ' '.join(sorted(set(os.environ) - {'LC_CTYPE'})) + os.getcwd()\n"
        "frame(b'F', struct.pack('>q', 1) + b'x'); frame(b'D', b'1')\n"
        "frame(b'L', b's' + names.strip('/').encode()); frame(b'E', b'')"
    )
    context = stage(_played_by(monkeypatch, tmp_path, program))

    assert context.notes == ("'' was left out: it is a symbolic link",)


# --- Any bytes ---------------------------------------------------------------------------------------------


def _mutations() -> st.SearchStrategy[bytes]:
    whole = {
        "tar": io.BytesIO(),
        "zip": io.BytesIO(),
    }
    with tarfile.open(fileobj=whole["tar"], mode="w") as tar:
        for info, content in (member("a" * 120, b"x" * 700), member("b", kind=tarfile.SYMTYPE, target="c")):
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(whole["zip"], "w") as archive:
        archive.writestr("a", b"x" * 700)
        archive.writestr("b", b"y")
    wholes = [buffer.getvalue()[:4_096] for buffer in whole.values()]
    return st.builds(
        lambda raw, edits: bytes(_edited(bytearray(raw), edits)),
        st.sampled_from(wholes),
        st.lists(st.tuples(st.integers(0, 4_095), st.integers(0, 255)), max_size=6),
    )


def _edited(raw: bytearray, edits: list[tuple[int, int]]) -> bytearray:
    for at, byte in edits:
        raw[at % len(raw)] = byte
    return raw


@pytest.mark.case("B05")
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(raw=st.one_of(_mutations(), st.binary(max_size=2_000)), form=st.sampled_from(["tar", "zip"]))
def test_whatever_the_bytes_the_reader_ends_with_one_last_word(raw: bytes, form: str) -> None:
    said: list[tuple[bytes, bytes]] = []

    def emit(kind: bytes, payload: bytes) -> None:
        said.append((kind, payload))

    archive_reader.read(io.BytesIO(raw), form, emit)

    assert [kind in {archive_reader.END, archive_reader.REFUSED} for kind, _ in said[:-1]].count(True) == 0
    assert said[-1][0] in {archive_reader.END, archive_reader.REFUSED}
    guard = archives._Guard("it", len(raw))
    try:
        for kind, payload in said:
            if kind == archive_reader.FILE:
                name = guard.file(payload)
                assert not {b"", b".", b".."} & set(name.split(b"/"))
            elif kind == archive_reader.DATA:
                guard.grows(len(payload))
    except ContextInputError:
        pass
