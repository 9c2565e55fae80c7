import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.contexts import ingest, store
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.errors import ContextInputError, RunCancelledError
from orchestrator.ids import LOCAL_TENANT
from tests.deep_trees import chain_of_directories
from tests.open_files import nothing_left_open

CANARY = "the canary outside the tree"

Stage = Callable[..., StagedContext]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    contexts = ContextStore(tmp_path / "store")

    def stage_paths(*paths: Path, cancelled: Callable[[], bool] = lambda: False) -> StagedContext:
        return contexts.stage_paths(LOCAL_TENANT, paths, cancelled=cancelled)

    with nothing_left_open():
        yield stage_paths
    assert not list((tmp_path / "store").rglob("t-*")), "a temporary file was left"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory to stage, with one ordinary file and a canary beside it."""
    (tmp_path / "canary").write_text(CANARY)
    directory = tmp_path / "tree"
    directory.mkdir()
    (directory / "file").write_text("text\n")
    return directory


def _names(context: StagedContext) -> list[str]:
    return [entry.path for entry in context.manifest.entries]


def _blob(context: StagedContext) -> bytes:
    return context.files.blob.read_bytes()


# --- What becomes what -------------------------------------------------------------------------------------


def test_one_file_is_one_text_without_a_name(stage: Stage, tree: Path) -> None:
    context = stage(tree / "file")

    assert context.manifest.kind == "text"
    assert _names(context) == [""]
    assert _blob(context) == b"text\n"
    assert context.notes == ()


def test_a_directory_is_files_named_from_it_in_the_order_of_their_bytes(stage: Stage, tree: Path) -> None:
    for name in ["b/z", "b/a/deep", "b-c", "b.txt", "A", "é", ".hidden", ".git/config"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)

    names = _names(stage(tree))

    assert names == sorted(names, key=os.fsencode)
    assert set(names) == {"b/z", "b/a/deep", "b-c", "b.txt", "A", "é", ".hidden", ".git/config", "file"}


def test_one_file_in_a_directory_is_still_files(stage: Stage, tree: Path) -> None:
    context = stage(tree)

    assert (context.manifest.kind, _names(context)) == ("files", ["file"])


def test_several_paths_are_named_from_the_directory_that_holds_them_all(stage: Stage, tmp_path: Path) -> None:
    for name in ["x/log", "y/log", "y/sub/z"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    context = stage(tmp_path / "y", tmp_path / "x" / "log")

    assert context.manifest.kind == "files"
    assert _names(context) == ["x/log", "y/log", "y/sub/z"]
    assert _blob(context) == b"x/logy/logy/sub/z"


def test_the_order_of_several_paths_makes_no_difference(stage: Stage, tree: Path) -> None:
    (tree / "other").write_text("x")

    assert stage(tree / "file", tree / "other").content_id == stage(tree / "other", tree / "file").content_id


def test_an_empty_file_among_others_is_kept(stage: Stage, tree: Path) -> None:
    (tree / "__init__.py").touch()

    assert _names(stage(tree)) == ["__init__.py", "file"]


def test_bytes_that_are_not_utf8_are_replaced_and_the_first_place_is_named(stage: Stage, tree: Path) -> None:
    (tree / "latin").write_bytes("ab\nné né".encode("latin-1"))

    context = stage(tree)

    assert context.notes == (
        "bytes that are not UTF-8 were replaced by U+FFFD 2 times, first at byte 4 of 'latin'",
    )


# --- What is refused ---------------------------------------------------------------------------------------


def test_a_missing_path_is_refused(stage: Stage, tree: Path) -> None:
    with pytest.raises(ContextInputError, match="does not exist"):
        stage(tree / "nothing")


def test_no_path_at_all_is_refused(stage: Stage) -> None:
    with pytest.raises(ContextInputError, match="no context"):
        stage()


def test_an_empty_file_is_refused(stage: Stage, tree: Path) -> None:
    (tree / "empty").touch()

    with pytest.raises(ContextInputError, match="is empty"):
        stage(tree / "empty")


def test_a_directory_without_files_is_refused(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "bare" / "below").mkdir(parents=True)

    with pytest.raises(ContextInputError, match="no regular file"):
        stage(tmp_path / "bare")


def test_a_directory_of_empty_files_is_refused(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "empty").touch()

    with pytest.raises(ContextInputError, match="are empty"):
        stage(tmp_path / "bare")


@pytest.mark.case("B04")
def test_a_device_or_a_pipe_as_the_context_is_refused_without_being_opened(stage: Stage, tree: Path) -> None:
    os.mkfifo(tree / "pipe")

    with pytest.raises(ContextInputError, match="is a named pipe"):
        stage(tree / "pipe")
    with pytest.raises(ContextInputError, match="is a device"):
        stage(Path("/dev/zero"))


def test_a_path_given_twice_is_refused_even_through_a_link(stage: Stage, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tree)

    with pytest.raises(ContextInputError, match="twice"):
        stage(tree, tmp_path / "again")
    with pytest.raises(ContextInputError, match="lies inside"):
        stage(tree / "file", tree)


def test_a_link_that_leads_to_itself_is_refused(stage: Stage, tree: Path) -> None:
    (tree / "loop").symlink_to("loop")

    with pytest.raises(ContextInputError, match="cannot be read"):
        stage(tree / "loop")


def test_a_path_with_a_nul_is_refused(stage: Stage) -> None:
    with pytest.raises(ContextInputError, match="cannot be read"):
        stage(Path("a\0b"))


def test_a_file_that_fails_in_the_middle_is_refused_by_name(stage: Stage) -> None:
    # A regular file whose first page nobody may read, not even root.
    with pytest.raises(ContextInputError, match=r"'/proc/self/mem' cannot be read: Input/output error"):
        stage(Path("/proc/self/mem"))


def test_a_file_or_directory_that_may_not_be_opened_is_refused(
    stage: Stage, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "locked").mkdir()
    real_open = os.open

    def open_all_but_locked(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_all_but_locked)
    for locked in ["locked", "file"]:
        with pytest.raises(ContextInputError, match=rf"'{locked}' cannot be read: Permission denied"):
            stage(tree)


def test_more_files_or_bytes_than_a_context_may_have_are_refused(
    stage: Stage, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "other").write_text("text")
    monkeypatch.setattr(store, "MAX_CONTEXT_FILES", 1)
    with pytest.raises(ContextInputError, match="more than 1 files"):
        stage(tree)
    monkeypatch.setattr(store, "MAX_CONTEXT_BYTES", 4)
    with pytest.raises(ContextInputError, match="more than 4 bytes"):
        stage(tree / "file")


@pytest.mark.case("B13")
def test_a_name_in_an_error_cannot_act_on_a_terminal(stage: Stage, tree: Path) -> None:
    with pytest.raises(ContextInputError) as caught:
        stage(tree / "\x1b[2J\n")

    assert "\\x1b[2J\\n" in str(caught.value)
    assert "\x1b" not in str(caught.value)


# --- Hostile trees -----------------------------------------------------------------------------------------


@pytest.mark.case("B04")
def test_links_sockets_pipes_are_left_out_and_named(stage: Stage, tree: Path, tmp_path: Path) -> None:
    (tree / "link").symlink_to(tmp_path / "canary")
    (tree / "relative").symlink_to("../canary")
    (tree / "dirlink").symlink_to(tmp_path)
    (tree / "dangling\x1b").symlink_to("nowhere")
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tree / "sock"))

        context = stage(tree)

    assert _names(context) == ["file"]
    assert CANARY.encode() not in _blob(context)
    assert sorted(context.notes) == [
        "'dangling\\x1b' was left out: it is a symbolic link",
        "'dirlink' was left out: it is a symbolic link",
        "'link' was left out: it is a symbolic link",
        "'pipe' was left out: it is a named pipe",
        "'relative' was left out: it is a symbolic link",
        "'sock' was left out: it is a socket",
    ]


@pytest.mark.case("B04")
def test_a_device_in_the_tree_is_left_out(stage: Stage, tree: Path) -> None:
    try:
        os.mknod(tree / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root can make a device")

    assert stage(tree).notes == ("'zero' was left out: it is a device",)


def test_the_given_path_itself_may_be_a_link(stage: Stage, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "typed").symlink_to(tree)
    (tmp_path / "typed-file").symlink_to(tree / "file")

    assert _names(stage(tmp_path / "typed")) == ["file"]
    assert stage(tmp_path / "typed-file").manifest.kind == "text"


@pytest.mark.case("B04")
def test_a_hard_link_is_a_file_like_any_other(stage: Stage, tree: Path) -> None:
    os.link(tree / "file", tree / "same")

    assert _names(stage(tree)) == ["file", "same"]


@pytest.mark.case("B04", "B15")
@pytest.mark.parametrize("swapped_for", ["link", "pipe", "directory", "nothing"])
def test_a_file_swapped_after_the_listing_is_left_out(
    stage: Stage, tree: Path, tmp_path: Path, swapped_for: str
) -> None:
    (tree / "victim").write_text("harmless")

    def swap() -> bool:
        victim = tree / "victim"
        if victim.is_file() and not victim.is_symlink():
            victim.unlink()
            if swapped_for == "link":
                victim.symlink_to(tmp_path / "canary")
            elif swapped_for == "pipe":
                os.mkfifo(victim)
            elif swapped_for == "directory":
                victim.mkdir()
        return False

    context = stage(tree, cancelled=swap)  # asked between listing and opening

    assert _names(context) == ["file"]
    assert CANARY.encode() not in _blob(context)
    assert [note.startswith("'victim' was left out: it is") for note in context.notes] == [True]


@pytest.mark.case("B04", "B15")
def test_a_directory_swapped_for_a_link_is_not_followed(stage: Stage, tree: Path, tmp_path: Path) -> None:
    (tree / "later").mkdir()
    (tree / "later" / "inside").write_text("inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "inside").write_text(CANARY)

    def swap() -> bool:
        if not (tree / "later").is_symlink():
            (tree / "later").rename(tmp_path / "moved")
            (tree / "later").symlink_to(tmp_path / "outside")
        return False

    context = stage(tree, cancelled=swap)

    assert _names(context) == ["file"]
    assert CANARY.encode() not in _blob(context)


@pytest.mark.case("B15")
@pytest.mark.parametrize("given", ["up/tree", "up/tree/file", "up/tree/x.tar"])
def test_a_directory_on_the_way_that_becomes_a_link_is_not_followed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    for top, text in (("up", "harmless"), ("outside", CANARY)):
        (tmp_path / top / "tree").mkdir(parents=True)
        (tmp_path / top / "tree" / "file").write_text(text)
        (tmp_path / top / "tree" / "x.tar").write_text(text)

    def find_and_swap(paths: Sequence[Path]) -> list[ingest.Source]:
        sources = ingest.find_sources(paths)
        (tmp_path / "up").rename(tmp_path / "moved")
        (tmp_path / "up").symlink_to("outside")
        return sources

    monkeypatch.setattr(store, "find_sources", find_and_swap)
    with pytest.raises(ContextInputError, match="cannot be read: Not a directory"):
        stage(tmp_path / given)


@pytest.mark.case("B04", "B15")
def test_a_directory_moved_away_while_it_is_read_ends_the_staging(
    stage: Stage, tree: Path, tmp_path: Path
) -> None:
    (tree / "a").mkdir()
    (tree / "a" / "inside").write_text("inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text(CANARY)

    asked = 0

    def move() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:  # once `a` is open and listed
            (tree / "a").rename(tmp_path / "outside" / "a")
        return False

    with pytest.raises(ContextInputError, match="was moved"):
        stage(tree, cancelled=move)


def test_a_file_that_changes_its_size_counts_as_it_was_read(stage: Stage, tree: Path) -> None:
    (tree / "file").write_text("x" * 3_000_000)
    asked = 0

    def truncate() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:  # after the first chunk
            os.truncate(tree / "file", 10)
        return False

    context = stage(tree, cancelled=truncate)

    assert context.manifest.entries[0].length_bytes == len(_blob(context)) < 3_000_000


def test_staging_is_cancelled_between_files(stage: Stage, tree: Path) -> None:
    with pytest.raises(RunCancelledError):
        stage(tree, cancelled=lambda: True)


def test_the_store_itself_is_not_staged(stage: Stage, tree: Path, tmp_path: Path) -> None:
    context = stage(tmp_path)

    assert _names(context) == ["canary", "tree/file"]
    assert context.notes == ("'store' was left out: it is the context store itself",)


def test_many_things_left_out_are_counted_and_not_all_named(stage: Stage, tree: Path) -> None:
    for number in range(ingest.MAX_NOTES + 7):
        (tree / f"link{number}").symlink_to("file")

    notes = stage(tree).notes

    assert len(notes) == ingest.MAX_NOTES + 1
    assert notes[-1] == "7 more notes like these"


# --- Names and depth ---------------------------------------------------------------------------------------


@pytest.mark.case("B13")
def test_names_that_are_not_utf8_stay_unique_and_are_told(stage: Stage, tree: Path) -> None:
    for raw in [b"caf\xe9", b"caf\\xe9", b"new\nline", b"\xff" * 200]:
        with open(os.fsencode(tree) + b"/" + raw, "wb") as file:
            file.write(raw)

    context = stage(tree)

    assert set(_names(context)) == {"caf\\xe9~2", "caf\\xe9", "new\nline", "\\xff" * 200, "file"}
    by_name = {entry.path: entry for entry in context.manifest.entries}
    entry = by_name["caf\\xe9~2"]
    assert _blob(context)[entry.offset :][: entry.length_bytes] == "caf\ufffd".encode()
    assert "a file name is not UTF-8; it is called 'caf\\xe9~2'" in context.notes


@pytest.mark.case("B04", "B13")
def test_a_tree_deeper_than_any_path_or_recursion_or_descriptor_limit_is_staged(
    stage: Stage, tree: Path
) -> None:
    with chain_of_directories(tree, 3_000):
        names = _names(stage(tree))

    assert names == ["d/" * 3_000 + "bottom", "file"]
