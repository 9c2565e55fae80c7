"""Trees that somebody changes while they are read, or made to hurt whoever reads or removes them: cases B.

No container is needed to show that a path leads nowhere. The oracle is a canary beside the tree: its words
are in no blob, and it is what it was.
"""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.contexts.store import ContextStore
from orchestrator.errors import ContextInputError
from orchestrator.ids import LOCAL_TENANT, TenantId
from tests.deep_trees import chain_of_directories

CANARY = b"the canary outside the tree"
SWAPS = 2_000
"""At least as many while a tree is read again and again."""
_LONGEST_S = 30.0


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_bytes(CANARY)
    directory = tmp_path / "tree"
    directory.mkdir()
    (directory / "a").write_text("harmless")
    (directory / "victim").write_text("harmless")
    return directory


class Swapper:
    """Puts one thing after the other where `victim` is, atomically, until the block ends."""

    def __init__(self, victim: Path, makers: list[Callable[[Path], object]]) -> None:
        self._victim = victim
        self._makers = makers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._swap)
        self.swaps = 0

    def __enter__(self) -> "Swapper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _swap(self) -> None:
        fresh = self._victim.with_name("fresh")
        old = self._victim.with_name("old")
        while not self._over.is_set():
            for make in self._makers:
                make(fresh)
                # A directory makes way for nothing else, so what was there is moved aside first.
                self._victim.rename(old)
                fresh.rename(self._victim)
                _remove(old)
                self.swaps += 1


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _file(path: Path) -> None:
    path.write_text("harmless")


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("harmless")


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _stage_until_swapped(store: ContextStore, given: Path, swapper: Swapper) -> list[bytes]:
    """What was read, again and again, while enough was swapped; refusals are as good as anything."""
    read: list[bytes] = []
    until_s = time.monotonic() + _LONGEST_S
    while swapper.swaps < SWAPS and time.monotonic() < until_s:
        try:
            context = store.stage_paths(LOCAL_TENANT, [given])
        except ContextInputError:
            continue
        read.append(context.files.blob.read_bytes())
        store.release(context)
    assert swapper.swaps >= SWAPS, "too few swaps to say anything"
    return read


@pytest.mark.case("B04", "B15")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_swapped_for_links_and_pipes_while_it_is_read_leads_nowhere(
    tmp_path: Path, tree: Path, kind: str
) -> None:
    store = ContextStore(tmp_path / "store")
    first = _file if kind == "file" else _directory
    target = "../outside/victim" if kind == "file" else "../outside"
    with Swapper(tree / "victim", [first, _link(target), os.mkfifo, _directory, _file]) as swapper:
        read = _stage_until_swapped(store, tree, swapper)

    assert read, "it was read at all"
    assert not any(CANARY in blob for blob in read)
    assert (tmp_path / "outside" / "victim").read_bytes() == CANARY
    assert not list((tmp_path / "store").rglob("t-*"))


@pytest.mark.case("B04", "B15")
@pytest.mark.control("B04", "B15")
def test_a_reader_that_checks_before_it_opens_does_see_the_canary(tmp_path: Path, tree: Path) -> None:
    with Swapper(tree / "victim", [_file, _link("../outside/victim")]):
        until_s = time.monotonic() + _LONGEST_S
        seen = False
        while not seen and time.monotonic() < until_s:
            try:
                if not (tree / "victim").is_symlink():
                    seen = (tree / "victim").read_bytes() == CANARY
            except OSError:
                continue

    assert seen, "the race above is one that can be lost"


# --- B06, B07: what a tree can do to who reads or removes it -----------------------------------------------


@pytest.mark.case("B04", "B13")
def test_ten_thousand_levels_are_read_without_recursion(tmp_path: Path, tree: Path) -> None:
    store = ContextStore(tmp_path / "store")
    with chain_of_directories(tree, 10_000):
        context = store.stage_paths(LOCAL_TENANT, [tree])

    assert context.manifest.entries[1].path == "d/" * 10_000 + "bottom"


@pytest.mark.case("B04")
def test_nothing_but_files_and_directories_is_opened(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tree / "pipe")
    (tree / "link").symlink_to("/etc/passwd")
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
        opened: list[str] = []
        real_open = os.open

        def watched_open(path: str, flags: int, *mode: int, dir_fd: int | None = None) -> int:
            opened.append(os.fsdecode(path))
            return real_open(path, flags, *mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", watched_open)
        context = ContextStore(tmp_path / "store").stage_paths(LOCAL_TENANT, [tree])

    assert [entry.path for entry in context.manifest.entries] == ["a", "victim"]
    assert {"pipe", "link", "sock"}.isdisjoint(opened)
    assert {"a", "victim"} <= set(opened), "the watch sees what is opened"


# --- B14: what tenants are called --------------------------------------------------------------------------


@pytest.mark.case("B14", "J11")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.text()
    | st.sampled_from(["..", "../../etc", "/", "a:b", "a\0b", "x" * 5_000, "a\nb", "аdmin", "\ud800"])
)
def test_no_word_of_a_tenant_is_part_of_a_path(tmp_path: Path, tenant: str) -> None:
    root = tmp_path / "store"
    store = ContextStore(root)
    context = store.stage_text(TenantId(tenant), b"x")

    for path in context.files:
        assert path.parent.parent == root
        assert path.resolve() == root.resolve() / path.parent.name / path.name
        assert len(path.parent.name) == 32
        assert all(char in "0123456789abcdef" for char in path.parent.name)
    store.release(context)


# --- Any tree ----------------------------------------------------------------------------------------------

_NAMES = st.binary(min_size=1, max_size=6).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
_CONTENTS = st.sampled_from([b"", b"text\n", "größer\n".encode(), b"\xff", "\ufeffx".encode()]) | st.just(
    70_000
).map(bytes)
_LEAVES = st.one_of(_CONTENTS, st.just("link"), st.just("pipe"))
_TREES = st.recursive(
    st.dictionaries(_NAMES, _LEAVES, max_size=4),
    lambda inner: st.dictionaries(_NAMES, inner | _LEAVES, max_size=4),
    max_leaves=12,
)


def _plant(top: bytes, tree: dict[bytes, object]) -> Iterator[tuple[bytes, bytes]]:
    """Makes the tree; every regular file in it, and what is in it."""
    os.mkdir(top)
    for name, what in tree.items():
        path = top + b"/" + name
        if isinstance(what, dict):
            yield from _plant(path, what)
        elif isinstance(what, bytes):
            with open(path, "xb") as file:
                file.write(what)
            yield path, what
        elif what == "link":
            os.symlink(b"../../outside/victim", path)
        else:
            os.mkfifo(path)


@pytest.mark.case("B04", "B13")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(planted=_TREES)
def test_any_tree_becomes_what_an_independent_reading_of_it_says(
    tmp_path: Path, tree: Path, planted: dict[bytes, object]
) -> None:
    top = os.fsencode(tmp_path / "any")
    shutil.rmtree(top, ignore_errors=True)
    expected = [
        (path.removeprefix(top + b"/"), raw.decode("utf-8", "replace").removeprefix("\ufeff").encode())
        for path, raw in _plant(top, planted)
    ]
    expected.sort()
    store = ContextStore(tmp_path / "store")
    if not any(text for _, text in expected):
        with pytest.raises(ContextInputError):
            store.stage_paths(LOCAL_TENANT, [Path(os.fsdecode(top))])
        return

    context = store.stage_paths(LOCAL_TENANT, [Path(os.fsdecode(top))])

    entries = context.manifest.entries
    blob = context.files.blob.read_bytes()
    assert [blob[e.offset : e.offset + e.length_bytes] for e in entries] == [text for _, text in expected]
    assert blob == b"".join(text for _, text in expected)
    assert [e.chars for e in entries] == [len(text.decode()) for _, text in expected]
    for entry, (raw_path, _) in zip(entries, expected, strict=True):
        assert entry.path.startswith(raw_path.decode(errors="backslashreplace"))
    assert len({entry.path for entry in entries}) == len(expected)
    store.release(context)
