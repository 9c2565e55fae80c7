import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.contexts import staging
from orchestrator.contexts.normalise import width_of
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.errors import (
    BudgetExceededError,
    ContextInputError,
    InvalidRequestError,
    InvariantError,
    MachineError,
    RunCancelledError,
)
from orchestrator.ids import TenantId
from sandbox_image.worker.interpreter.files import FileMap
from sandbox_image.worker.interpreter.staged import open_context

ALICE = TenantId("alice")
BOB = TenantId("../../bob\n\x00")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ContextStore:
    return ContextStore(root)


def _stored(root: Path) -> list[str]:
    """Kinds of the files in the store: `b` blob, `l` landmarks, `m` manifest, `t` temporary."""
    return sorted(path.name[0] for path in root.rglob("*") if path.is_file())


def _sandbox(tmp_path: Path, name: str = "sandbox") -> Path:
    directory = tmp_path / name
    directory.mkdir()
    return directory


def _read_as_guest(directory: Path) -> dict[str, str]:
    """Each text by its path, read as the guest's library does."""
    context = open_context(directory, 1_000_000_000).value
    texts = dict(context) if isinstance(context, FileMap) else {"": context}
    return {path: str(text) for path, text in texts.items()}


def _guest_view(store: ContextStore, context: StagedContext, tmp_path: Path) -> dict[str, str]:
    directory = _sandbox(tmp_path, f"sandbox-{os.urandom(4).hex()}")
    store.link_into(context, directory)
    return _read_as_guest(directory)


# --- Staging -----------------------------------------------------------------------------------------------


def test_a_staged_text_reaches_the_guest_normalised(store: ContextStore, tmp_path: Path) -> None:
    context = store.stage_text(ALICE, "\ufeffcaf\u00e9\n".encode() + b"\xff\n")

    assert _guest_view(store, context, tmp_path) == {"": "café\n\ufffd\n"}
    assert context.manifest.shape.replaced == 1
    assert context.notes == (
        "bytes that are not UTF-8 were replaced by U+FFFD once, first at byte 9 of the context",
    )


def test_a_blob_is_named_by_the_hash_of_what_is_in_it(store: ContextStore, root: Path) -> None:
    text = "größer\n" * 300_000

    context = store.stage_text(ALICE, text.encode())

    (blob,) = root.rglob("b-*")
    assert blob.name == "b-" + hashlib.sha256(text.encode()).hexdigest()
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == context.manifest.sha256
    assert context.manifest.entries[0].chars == len(text)


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused_and_leaves_nothing(store: ContextStore, root: Path, raw: bytes) -> None:
    with pytest.raises(ContextInputError, match="empty"):
        store.stage_text(ALICE, raw)

    assert _stored(root) == []


def test_staging_is_cancelled_between_chunks_and_leaves_nothing(store: ContextStore, root: Path) -> None:
    looks = iter([False, False, True])

    with pytest.raises(RunCancelledError):
        store.stage_text(ALICE, b"x" * 5 * staging.CHUNK_BYTES, cancelled=lambda: next(looks))

    assert _stored(root) == []


def test_a_disk_that_takes_no_more_is_reported_and_leaves_nothing(
    store: ContextStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = open

    def open_full(file: object, *args: object, **kwargs: object) -> object:
        # The kernel's own full disk, in place of the temporary file.
        if isinstance(file, int):
            os.close(file)
            return real_open("/dev/full", "wb", buffering=16)
        return real_open(file, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(staging, "open", open_full, raising=False)

    with pytest.raises(MachineError, match="No space left on device"):
        store.stage_text(ALICE, b"x" * 1_000)

    assert _stored(root) == []


# --- Who can reach it --------------------------------------------------------------------------------------


def test_the_store_is_private_and_its_files_are_read_only(store: ContextStore, root: Path) -> None:
    store.stage_text(ALICE, b"x")

    modes = {oct(path.stat().st_mode & 0o777) for path in root.rglob("*") if path.is_dir()}
    assert modes == {"0o700"}
    assert oct(root.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in root.rglob("*") if path.is_file()} == {"0o444"}


def test_a_root_that_others_can_reach_into_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)

    with pytest.raises(MachineError, match="0700"):
        ContextStore(shared)


def test_a_root_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")

    with pytest.raises(MachineError, match="must be a directory"):
        ContextStore(tmp_path / "link")


def test_tenants_share_no_file_and_no_tenant_is_part_of_a_path(store: ContextStore, root: Path) -> None:
    store.stage_text(ALICE, b"same")
    store.stage_text(BOB, b"same")

    assert _stored(root) == ["b", "b", "l", "l", "m", "m"]
    tenants = [path.name for path in root.iterdir()]
    assert len(tenants) == 2
    assert all(len(name) == 32 and name.isalnum() for name in tenants)


# --- Linking into a sandbox --------------------------------------------------------------------------------


def test_a_sandbox_gets_links_and_no_copy(store: ContextStore, root: Path, tmp_path: Path) -> None:
    context = store.stage_text(ALICE, b"text")
    directory = _sandbox(tmp_path)

    store.link_into(context, directory)

    assert sorted(os.listdir(directory)) == ["blob", "landmarks", "manifest"]
    (blob,) = root.rglob("b-*")
    assert (directory / "blob").samefile(blob)
    assert {(directory / name).stat().st_mode & 0o777 for name in os.listdir(directory)} == {0o444}


def test_linking_twice_leaves_no_stray_names(store: ContextStore, tmp_path: Path) -> None:
    first = store.stage_text(ALICE, b"first")
    directory = _sandbox(tmp_path)

    store.link_into(first, directory)
    store.link_into(first, directory)
    assert sorted(os.listdir(directory)) == ["blob", "landmarks", "manifest"]

    store.link_into(store.stage_text(ALICE, b"second"), directory)
    assert sorted(os.listdir(directory)) == ["blob", "landmarks", "manifest"]
    assert _read_as_guest(directory) == {"": "second"}


def test_the_manifest_comes_last(
    store: ContextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    real_rename = os.rename

    def rename(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        published.append(target)
        real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    context = store.stage_text(ALICE, b"x")
    monkeypatch.setattr(os, "rename", rename)
    store.link_into(context, _sandbox(tmp_path))

    assert published == ["blob", "landmarks", "manifest"]


def test_a_context_directory_that_is_a_link_is_refused(store: ContextStore, tmp_path: Path) -> None:
    _sandbox(tmp_path, "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere")

    with pytest.raises(MachineError):
        store.link_into(store.stage_text(ALICE, b"x"), tmp_path / "link")

    assert os.listdir(tmp_path / "elsewhere") == []


# --- References --------------------------------------------------------------------------------------------


def test_the_same_content_is_stored_once_and_goes_with_its_last_reference(
    store: ContextStore, root: Path
) -> None:
    first = store.stage_text(ALICE, b"same")
    second = store.stage_text(ALICE, b"same")
    assert _stored(root) == ["b", "l", "m"]

    store.release(first)
    store.release(first)
    assert _stored(root) == ["b", "l", "m"]

    store.release(second)
    assert _stored(root) == []


def test_a_sandbox_keeps_its_context_after_the_release(store: ContextStore, tmp_path: Path) -> None:
    context = store.stage_text(ALICE, b"kept")
    directory = _sandbox(tmp_path)
    store.link_into(context, directory)

    store.release(context)

    assert _read_as_guest(directory) == {"": "kept"}


def test_a_released_context_can_be_neither_linked_nor_derived_from(
    store: ContextStore, root: Path, tmp_path: Path
) -> None:
    context = store.stage_text(ALICE, b"gone")
    store.release(context)

    with pytest.raises(InvariantError):
        store.link_into(context, _sandbox(tmp_path))
    with pytest.raises(InvariantError):
        store.derive_range(context, "", 0, 4)
    assert _stored(root) == []


def test_many_threads_staging_and_releasing_the_same_text_leave_nothing(
    store: ContextStore, root: Path, tmp_path: Path
) -> None:
    ready = threading.Barrier(8)

    def work(number: int) -> None:
        directory = _sandbox(tmp_path, f"s{number}")
        ready.wait()
        for _ in range(50):
            context = store.stage_text(ALICE, b"contended" * 1_000)
            child = store.derive_range(context, "", 0, 9)
            store.release(context)
            store.link_into(child, directory)
            assert _read_as_guest(directory) == {"": "contended"}
            store.release(child)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    assert _stored(root) == []


def test_closing_removes_everything(store: ContextStore, root: Path) -> None:
    context = store.stage_text(ALICE, b"x")

    store.close()

    assert not root.exists()
    store.release(context)


# --- A child's context -------------------------------------------------------------------------------------

_TEXT = "naïve 漢字 😀\nsecond line\n"


def test_a_range_is_a_context_over_the_same_blob(store: ContextStore, root: Path, tmp_path: Path) -> None:
    context = store.stage_text(ALICE, _TEXT.encode())
    start, end = len("naïve ".encode()), len("naïve 漢字 😀".encode())

    child = store.derive_range(context, "", start, end)

    assert _guest_view(store, child, tmp_path) == {"": "漢字 😀"}
    (entry,) = child.manifest.entries
    assert (entry.chars, entry.width, entry.measured.lines) == (4, 4, 1)
    assert _stored(root) == ["b", "l", "m", "m"]
    store.release(context)
    assert _stored(root) == ["b", "l", "m"]
    store.release(child)
    assert _stored(root) == []


def test_the_same_range_of_the_same_text_has_the_same_content_id_and_no_other_has_it(
    store: ContextStore,
) -> None:
    first, again = (store.stage_text(ALICE, _TEXT.encode()) for _ in range(2))
    part = store.derive_range(first, "", 0, 7)

    assert part.content_id == store.derive_range(again, "", 0, 7).content_id
    assert store.derive_range(part, "", 1, 5).content_id == store.derive_range(first, "", 1, 5).content_id
    others = [store.derive_range(first, "", *place) for place in ((0, 6), (1, 7))]
    assert len({part.content_id, first.content_id, *(other.content_id for other in others)}) == 4


def test_a_range_of_one_file_is_counted_from_its_start(store: ContextStore, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("aaaa")
    (tmp_path / "in/b").write_text("0123456")
    context = store.stage_paths(ALICE, [tmp_path / "in"])

    child = store.derive_range(context, "b", 2, 4)
    grandchild = store.derive_range(child, "", 1, 2)

    assert _guest_view(store, child, tmp_path) == {"": "23"}
    assert _guest_view(store, grandchild, tmp_path) == {"": "3"}


def test_a_whole_text_as_a_range_is_not_read_again(store: ContextStore) -> None:
    context = store.stage_text(ALICE, _TEXT.encode())

    def fail() -> bool:
        raise AssertionError("the range was scanned")

    child = store.derive_range(context, "", 0, len(_TEXT.encode()), cancelled=fail)

    assert child.content_id == context.content_id


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=20), st.data())
def test_a_range_is_accepted_exactly_when_its_characters_are_whole(
    store: ContextStore, text: str, data: st.DataObject
) -> None:
    raw = ("|" + text).encode()  # not a byte order mark first
    start = data.draw(st.integers(0, len(raw) - 1))
    end = data.draw(st.integers(start + 1, len(raw)))
    context = store.stage_text(ALICE, raw)
    try:
        expected = raw[start:end].decode()
    except UnicodeDecodeError:
        with pytest.raises(InvalidRequestError, match="splits a character"):
            store.derive_range(context, "", start, end)
    else:
        measured = store.derive_range(context, "", start, end).manifest.entries[0].measured
        lines = expected.count("\n") + (not expected.endswith("\n"))
        assert (measured.length_bytes, measured.chars, measured.lines) == (end - start, len(expected), lines)
        assert measured.width == width_of(expected)


def test_a_range_that_starts_with_a_zero_width_no_break_space_keeps_it(store: ContextStore) -> None:
    context = store.stage_text(ALICE, "a\ufeffb".encode())

    assert store.derive_range(context, "", 1, 5).manifest.entries[0].chars == 2


def test_a_range_knows_of_replacements_in_it(store: ContextStore) -> None:
    context = store.stage_text(ALICE, b"good\nb\xffd\n")

    assert store.derive_range(context, "", 0, 5).manifest.shape.replaced == 0
    assert store.derive_range(context, "", 5, 10).manifest.shape.replaced == 1


def test_a_long_range_is_counted_from_landmark_to_landmark(store: ContextStore) -> None:
    text = "x" + "é\n" * staging.CHUNK_BYTES + "漢" + "x" * 1_000_000
    raw = text.encode()
    context = store.stage_text(ALICE, raw)
    ends = [1, 4, 200_002, 3 * staging.CHUNK_BYTES - 2, len(raw) - 999_000, len(raw)]

    for start, end in combinations(ends, 2):
        measured = store.derive_range(context, "", start, end).manifest.entries[0].measured
        part = raw[start:end].decode()
        lines = part.count("\n") + (not part.endswith("\n"))
        assert (measured.chars, measured.lines, measured.width) == (len(part), lines, width_of(part))


def test_deriving_from_a_text_with_replacements_is_cancelled_between_chunks(store: ContextStore) -> None:
    context = store.stage_text(ALICE, b"\xff" + b"x" * 3 * staging.CHUNK_BYTES)
    looks = iter([False, True])

    with pytest.raises(RunCancelledError):
        store.derive_range(context, "", 3, 3 * staging.CHUNK_BYTES, cancelled=lambda: next(looks))


def test_some_files_are_a_context_over_the_same_blob(store: ContextStore, root: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / name).write_text(name * 3)
    context = store.stage_paths(ALICE, [tmp_path / "in"])

    child = store.derive_paths(context, ["c", "a"])

    assert _guest_view(store, child, tmp_path) == {"c": "ccc", "a": "aaa"}
    assert _stored(root) == ["b", "l", "m", "m"]
    with pytest.raises(ContextInputError):
        store.derive_paths(context, ["d"])


# --- Uploads -----------------------------------------------------------------------------------------------


def test_a_text_is_uploaded_in_parts_that_split_characters(store: ContextStore, tmp_path: Path) -> None:
    raw = _TEXT.encode()
    with store.upload(ALICE) as upload:
        for start in range(0, len(raw), 3):
            upload.write(raw[start : start + 3])
        context = upload.finish()

    assert _guest_view(store, context, tmp_path) == {"": _TEXT}


def test_files_are_uploaded_one_after_the_other(store: ContextStore, tmp_path: Path) -> None:
    with store.upload(ALICE) as upload:
        upload.start_file(b"b/one.txt")
        upload.write(b"1")
        upload.start_file(b"empty")
        upload.start_file("ä".encode())
        upload.write(b"\xff")
        context = upload.finish()

    assert _guest_view(store, context, tmp_path) == {"b/one.txt": "1", "empty": "", "ä": "\ufffd"}
    assert "of 'ä'" in context.notes[0]


def test_an_upload_that_is_not_finished_leaves_nothing(store: ContextStore, root: Path) -> None:
    with store.upload(ALICE) as upload:
        upload.write(b"half of it")

    assert _stored(root) == []


@pytest.mark.parametrize(
    "path",
    [b"", b"/etc/passwd", b"..", b"a/../../b", b"./a", b"a//b", b"a/", b"a\0b", b"\xff", b"a" * 4_097],
)
def test_an_upload_path_that_leads_anywhere_else_is_refused(store: ContextStore, path: bytes) -> None:
    with store.upload(ALICE) as upload, pytest.raises(InvalidRequestError):
        upload.start_file(path)


def test_a_path_uploaded_twice_is_refused(store: ContextStore) -> None:
    with store.upload(ALICE) as upload:
        upload.start_file(b"a")
        with pytest.raises(InvalidRequestError, match="twice"):
            upload.start_file(b"a")


def test_an_upload_is_one_text_or_files_and_not_both(store: ContextStore) -> None:
    with store.upload(ALICE) as upload:
        upload.write(b"text")
        with pytest.raises(InvalidRequestError, match="one text"):
            upload.start_file(b"a")


def test_an_upload_of_nothing_is_refused(store: ContextStore, root: Path) -> None:
    with store.upload(ALICE) as upload, pytest.raises(InvalidRequestError):
        upload.finish()
    with store.upload(ALICE) as upload:
        upload.start_file(b"a")
        with pytest.raises(InvalidRequestError, match="empty"):
            upload.finish()
    assert _stored(root) == []


def test_an_upload_stops_at_its_caps(store: ContextStore, root: Path) -> None:
    with store.upload(ALICE, max_bytes=10) as upload:
        upload.write(b"x" * 10)
        with pytest.raises(BudgetExceededError):
            upload.write(b"x")
    with store.upload(ALICE, max_files=1) as upload:
        upload.start_file(b"a")
        with pytest.raises(BudgetExceededError):
            upload.start_file(b"b")
    assert _stored(root) == []


def test_an_upload_is_capped_by_what_it_becomes_on_disk_too(store: ContextStore) -> None:
    with store.upload(ALICE, max_bytes=10) as upload, pytest.raises(BudgetExceededError):
        upload.write(b"\xff" * 4)
