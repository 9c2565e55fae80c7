"""Who a sandbox is to the kernel: uids that no other live sandbox of this host has.

Kernel quotas are counted per uid (inotify instances, pipe pages, keys, message queues), so two sandboxes
with one uid could starve each other, whoever started them. Rules:

1. A block of uids belongs to one process: it holds a `flock` on the block's file. The files are in one
   directory of the host, whatever the state directory, so all orchestrators that root starts on this host
   share them.
2. A uid in use has a mark, a file with its sandbox's id. It is made before the container and removed when the
   container is confirmed gone. It outlives its process: the uid of a sandbox that was left behind is in
   quarantine until the reaper has seen to it.
3. A marked uid is not given out, whoever marked it.
4. A uid given back goes to the end of the queue.

Only root can give files to another uid. Without root all sandboxes of a user run as that user.
"""

import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import MachineError, SandboxStartError
from orchestrator.ids import SandboxId
from orchestrator.sandbox.locks import try_lock

HOST_DIRECTORY = Path("/run/rlm/uids")
"""Emptied by a reboot, as every container is ended by one."""

_FIRST_UID = 200_000
_UIDS_PER_BLOCK = 1_000
_BLOCKS = 1_000


class GuestUids:
    """One block of uids. Made by `claim_uids`."""

    def __init__(self, directory: Path, block: int) -> None:
        self._directory = directory
        self._block = block
        first = _FIRST_UID + block * _UIDS_PER_BLOCK
        self._free = deque(range(first, first + _UIDS_PER_BLOCK))

    def take(self, sandbox_id: SandboxId) -> int:
        """A uid for a sandbox about to be made.

        Raises:
            SandboxStartError: All are taken or in quarantine.
        """
        for _ in range(len(self._free)):
            uid = self._free.popleft()
            try:
                mark = os.open(self._mark(uid), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                # Of a sandbox that an earlier owner of the block left behind.
                self._free.append(uid)
                continue
            with os.fdopen(mark, "w", encoding="ascii") as file:
                file.write(sandbox_id)
            return uid
        raise SandboxStartError(f"{_UIDS_PER_BLOCK} sandboxes are there: there is no uid left")

    def give_back(self, uid: int) -> None:
        """The sandbox that had it is confirmed gone."""
        self._mark(uid).unlink(missing_ok=True)
        self._free.append(uid)

    def _mark(self, uid: int) -> Path:
        return self._directory / f"{uid}.uid"

    def end_quarantine(self, there: Collection[SandboxId], *, ours: Collection[SandboxId]) -> int:
        """Remove the marks of sandboxes that are gone; how many there were.

        Only in blocks that no other living process owns: its sandboxes may be on their way to the engine.

        Args:
            there: All sandboxes that the engine has.
            ours: Those of this process that are being made, in use or not confirmed gone.
        """
        ended = 0
        by_block: dict[int, dict[int, SandboxId]] = {}
        for uid, sandbox_id in _marks(self._directory).items():
            by_block.setdefault(_block_of(uid), {})[uid] = sandbox_id
        for block, marks in by_block.items():
            with self._owned(block) as owned:
                for uid, sandbox_id in marks.items():
                    if owned and sandbox_id not in there and sandbox_id not in ours:
                        self._mark(uid).unlink(missing_ok=True)
                        ended += 1
        return ended

    def has_living_owner(self, uid: int) -> bool:
        """Whether the process that gave out this uid is alive."""
        if not is_guest_uid(uid):
            return False
        block = _block_of(uid)
        if block == self._block:
            return True
        with self._owned(block) as owned:
            return not owned

    @contextmanager
    def _owned(self, block: int) -> Iterator[bool]:
        """Whether the block is ours for the length of the block of code: it is, or nobody else's."""
        if block == self._block:
            yield True
            return
        lock = try_lock(_lock_file(self._directory, block))
        try:
            yield lock is not None
        finally:
            if lock is not None:
                os.close(lock)


@contextmanager
def claim_uids(directory: Path = HOST_DIRECTORY) -> Iterator[GuestUids]:
    """A block of uids for the length of the block.

    Raises:
        MachineError: All blocks are taken, or the directory cannot be used.
    """
    for block in range(_BLOCKS):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = try_lock(_lock_file(directory, block))
        except OSError as error:
            raise MachineError(
                f"{str(directory)!r}, where sandboxes get their uids, cannot be used ({error.strerror})"
            ) from error
        if lock is not None:
            try:
                yield GuestUids(directory, block)
            finally:
                os.close(lock)
            return
    raise MachineError(f"{_BLOCKS} orchestrators run on this host: that is too many")


def is_guest_uid(uid: int) -> bool:
    """Whether it is one of those that are given out here."""
    return _FIRST_UID <= uid < _FIRST_UID + _BLOCKS * _UIDS_PER_BLOCK


def _lock_file(directory: Path, block: int) -> Path:
    return directory / f"{block}.lock"


def _block_of(uid: int) -> int:
    return (uid - _FIRST_UID) // _UIDS_PER_BLOCK


def _marks(directory: Path) -> Mapping[int, SandboxId]:
    marks = {}
    for path in directory.glob("*.uid"):
        with suppress(FileNotFoundError):
            marks[int(path.stem)] = SandboxId(path.read_text(encoding="ascii"))
    return marks
