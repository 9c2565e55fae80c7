import errno
import os
import threading
from collections.abc import Callable

import pytest

from sandbox_image.worker import protocol
from sandbox_image.worker.interpreter import used_up as module
from sandbox_image.worker.interpreter.used_up import used_up

Stat = os.statvfs_result


def raised(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def mounts(monkeypatch: pytest.MonkeyPatch, **free: tuple[int, int, int]) -> None:
    """Free bytes, files and free files of /tmp and /dev/shm."""

    def statvfs(path: str) -> Stat:
        room, files, free_files = free[path.rpartition("/")[2]]
        return Stat((4_096, 4_096, 0, 0, room // 4_096, files, free_files, free_files, 0, 255))

    monkeypatch.setattr(module.os, "statvfs", statvfs)  # type: ignore[attr-defined]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
ROOM = 1 << 20


@pytest.mark.parametrize(
    ("tmp", "shm", "expected"),
    [
        ((0, 99, 9), (ROOM, 99, 9), [protocol.TMP_BYTES]),
        ((ROOM, 99, 9), (0, 99, 9), [protocol.SHM_BYTES]),
        ((0, 99, 9), (0, 99, 9), [protocol.TMP_BYTES, protocol.SHM_BYTES]),
        ((ROOM, 99, 0), (ROOM, 99, 9), [protocol.TMP_FILES]),
        ((0, 0, 0), (ROOM, 0, 0), [protocol.TMP_BYTES]),
        # Neither is full: something larger than what is left was wanted at once.
        ((ROOM, 99, 9), (2 * ROOM, 99, 9), [protocol.TMP_BYTES]),
    ],
)
def test_no_space_is_told_of_the_file_system_that_has_none(
    monkeypatch: pytest.MonkeyPatch,
    tmp: tuple[int, int, int],
    shm: tuple[int, int, int],
    expected: list[str],
) -> None:
    mounts(monkeypatch, tmp=tmp, shm=shm)
    assert used_up(NO_SPACE) == expected


def test_what_an_error_was_raised_from_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts(monkeypatch, tmp=(0, 99, 9), shm=(ROOM, 99, 9))

    open_files = OSError(errno.EMFILE, "Too many open files")
    failed = RuntimeError("it failed")
    failed.__context__, failed.__cause__ = NO_SPACE, open_files
    assert used_up(failed) == [protocol.OPEN_FILES]
    failed.__cause__ = None
    assert used_up(failed) == [protocol.TMP_BYTES]
    endless = RuntimeError("one")
    endless.__context__ = other = RuntimeError("other")
    other.__context__ = endless
    assert used_up(endless) == []


def test_no_more_processes_are_told_from_a_pipe_that_is_not_read() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        full = raised(lambda: [os.write(write, bytes(65_536)) for _ in range(1_000)])
        assert isinstance(full, BlockingIOError)
        assert used_up(full) == []
    finally:
        os.close(read)
        os.close(write)
    assert used_up(RuntimeError("can't start new thread")) == [protocol.PROCESSES]
    assert used_up(RuntimeError("can't start new thread", 1)) == []


def test_an_exception_of_the_cells_own_runs_nothing() -> None:
    ran = threading.Event()

    class OwnError(OSError):
        @property
        def errno(self) -> int:  # type: ignore[override]
            ran.set()
            return errno.ENOSPC

        __cause__ = __context__ = property(lambda self: ran.set())

    assert used_up(OwnError()) == []
    assert not ran.is_set()
