"""One orchestrator process on one machine: its private directory, its lock, its block of uids.

Who is alive is known by lock, not by label: an instance holds a `flock` for as long as it lives, and the
kernel lets go of it whatever ends the process. Everything under the directory of an instance whose lock is
free was left behind, and so were the containers that carry its id.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from orchestrator.errors import MachineError, SandboxStartError
from orchestrator.ids import InstanceId, SandboxId, new_instance_id

_FIRST_UID = 200_000
_UIDS_PER_INSTANCE = 1_000
_UID_BLOCKS = 1_000


class Instance:
    """This process's share of the state directory. Made by `claim_instance`."""

    def __init__(self, instance_id: InstanceId, directory: Path, first_uid: int | None) -> None:
        self.instance_id = instance_id
        self.contexts_dir = directory / "contexts"
        self._sandboxes_dir = directory / "sandboxes"
        self._free_uids = (
            None if first_uid is None else list(range(first_uid + _UIDS_PER_INSTANCE - 1, first_uid - 1, -1))
        )

    @contextmanager
    def sandbox_directories(self, sandbox_id: SandboxId) -> Iterator[tuple[Path, Path]]:
        """The socket's and the context's directory of one sandbox, removed after the block."""
        directory = self._sandboxes_dir / sandbox_id
        socket_dir, context_dir = directory / "sock", directory / "ctx"
        socket_dir.mkdir(parents=True)
        context_dir.mkdir()
        try:
            yield socket_dir, context_dir
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def guest_uid(self) -> Iterator[int | None]:
        """A uid that no other live sandbox has; None when we are not root and can't give files away.

        Freed uids go to the end of the queue, so that one is not used again soon.
        """
        if self._free_uids is None:
            yield None
            return
        if not self._free_uids:
            raise SandboxStartError(f"{_UIDS_PER_INSTANCE} sandboxes are running: there is no uid left")
        uid = self._free_uids.pop()
        try:
            yield uid
        finally:
            self._free_uids.insert(0, uid)


@contextmanager
def claim_instance(state_dir: Path) -> Iterator[Instance]:
    """A new instance for the length of the block; its directory is removed after it.

    Raises:
        MachineError: The state directory cannot be used.
    """
    instance_id = new_instance_id()
    with ExitStack() as stack:
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            instances = state_dir / "instances"
            instances.mkdir(mode=0o700, exist_ok=True)
            stack.callback(os.close, _new_lock(instances, instance_id))
            stack.callback(forget_instance, state_dir, instance_id)
            directory = instances / instance_id
            directory.mkdir(mode=0o700)
            (directory / "contexts").mkdir(mode=0o700)
            (directory / "sandboxes").mkdir(mode=0o711)
            first_uid = stack.enter_context(_uid_block(state_dir)) if os.geteuid() == 0 else None
        except OSError as error:
            raise MachineError(
                f"the state directory {str(state_dir)!r} cannot be used ({error.strerror}): "
                "set RLM_STATE_DIR to one that can"
            ) from error
        yield Instance(instance_id, directory, first_uid)


def dead_instances(state_dir: Path) -> list[InstanceId]:
    """The instances whose lock is free: their process is gone."""
    dead = []
    for path in sorted((state_dir / "instances").glob("i*.lock")):
        lock = _lock(path)
        if lock is not None:
            os.close(lock)
            dead.append(InstanceId(path.stem))
    return dead


def forget_instance(state_dir: Path, instance_id: InstanceId) -> None:
    """Remove what a dead instance left in the state directory."""
    shutil.rmtree(state_dir / "instances" / instance_id, ignore_errors=True)
    (state_dir / "instances" / f"{instance_id}.lock").unlink(missing_ok=True)


@contextmanager
def _uid_block(state_dir: Path) -> Iterator[int]:
    """The first uid of a block that no other live instance has, for the length of the block."""
    blocks = state_dir / "uids"
    blocks.mkdir(mode=0o700, exist_ok=True)
    for number in range(_UID_BLOCKS):
        lock = _lock(blocks / f"{number}.lock")
        if lock is not None:
            try:
                yield _FIRST_UID + number * _UIDS_PER_INSTANCE
            finally:
                os.close(lock)
            return
    raise MachineError(f"{_UID_BLOCKS} orchestrators share this state directory: that is too many")


def _new_lock(instances: Path, instance_id: InstanceId) -> int:
    """The open, locked descriptor of a new instance's lock file.

    It gets its name when it is locked already: between the two, somebody looking for dead instances would
    take this one for dead.
    """
    nameless = instances / f"new-{instance_id}"
    descriptor = os.open(nameless, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        nameless.rename(instances / f"{instance_id}.lock")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(path: Path) -> int | None:
    """An open, locked descriptor, or None when another process has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
