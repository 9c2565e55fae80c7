"""One orchestrator process on one machine: its private directory, its lock, its uids.

Who is alive is known by lock, not by label: an instance holds a `flock` for as long as it lives, and the
kernel lets go of it whatever ends the process. Everything under the directory of an instance whose lock is
free was left behind, and so were the containers that carry its id. What the reaper (`reaper.py`) needs to
know of such an instance is in its directory:

    i….lock                the lock
    i…/contexts            staged contexts
    i…/sandboxes/s…        socket and context of one sandbox, while it is there
    i…/containers/s…       what the engine calls that sandbox, from its making until it is confirmed gone
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.errors import MachineError
from orchestrator.ids import InstanceId, SandboxId, new_instance_id
from orchestrator.sandbox.locks import try_lock
from orchestrator.sandbox.uids import HOST_DIRECTORY, GuestUids, claim_uids

_UNBORN_FOR_S = 60.0


class Instance:
    """This process's share of the state directory. Made by `claim_instance`.

    It also knows its sandboxes: those that are `alive`, from before they are made until they are ended, and
    those that are `leaked`: the engine has not confirmed their end, so they keep their uid and their record.
    """

    def __init__(self, instance_id: InstanceId, state_dir: Path, uids: GuestUids | None) -> None:
        directory = state_dir / "instances" / instance_id
        self.instance_id = instance_id
        self.state_dir = state_dir
        self.contexts_dir = directory / "contexts"
        self.uids = uids
        """None when we are not root."""
        self.alive: set[SandboxId] = set()
        self.leaked: dict[SandboxId, int | None] = {}
        """With the uid of each."""
        self.on_leaks: Callable[[int], None] = lambda _count: None
        """Told how many are leaked whenever that changes."""
        self._sandboxes_dir = directory / "sandboxes"
        self._containers_dir = directory / "containers"

    @contextmanager
    def sandbox_directories(self, sandbox_id: SandboxId) -> Iterator[tuple[Path, Path]]:
        """The socket's and the context's directory of one sandbox, removed after the block."""
        directory = self._sandboxes_dir / sandbox_id
        socket_dir, context_dir = directory / "sock", directory / "ctx"
        socket_dir.mkdir(parents=True)
        context_dir.mkdir()
        # The guest's uid is not ours, and our umask may keep everything from others.
        context_dir.chmod(0o755)
        try:
            yield socket_dir, context_dir
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def begin(self, sandbox_id: SandboxId) -> int | None:
        """A sandbox is about to be made; the uid it gets, None when we aren't root and can't give files away.

        Raises:
            SandboxStartError: There is no uid left.
        """
        uid = None if self.uids is None else self.uids.take(sandbox_id)
        self.alive.add(sandbox_id)
        return uid

    def record(self, sandbox_id: SandboxId) -> Path:
        """The file that says what the engine calls a sandbox."""
        return self._containers_dir / sandbox_id

    def containers(self, sandbox_ids: Iterable[SandboxId]) -> list[str]:
        """What the engine called these sandboxes, as far as it got to making them."""
        recorded = containers_of(self.state_dir, self.instance_id)
        return [recorded[sandbox_id] for sandbox_id in sandbox_ids if sandbox_id in recorded]

    def ended(self, sandbox_id: SandboxId, uid: int | None) -> None:
        """It is confirmed gone."""
        self.alive.discard(sandbox_id)
        if sandbox_id in self.leaked:
            del self.leaked[sandbox_id]
            self.on_leaks(len(self.leaked))
        self.record(sandbox_id).unlink(missing_ok=True)
        if self.uids is not None and uid is not None:
            self.uids.give_back(uid)

    def leak(self, sandbox_id: SandboxId, uid: int | None) -> None:
        """It should be gone, and that was not confirmed."""
        self.alive.discard(sandbox_id)
        self.leaked[sandbox_id] = uid
        self.on_leaks(len(self.leaked))


@contextmanager
def claim_instance(state_dir: Path, *, uids_dir: Path = HOST_DIRECTORY) -> Iterator[Instance]:
    """A new instance for the length of the block; its directory is removed after it.

    Not what the reaper needs in order to remove sandboxes that were leaked.

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
            forgetting = stack.enter_context(ExitStack())
            forgetting.callback(forget_instance, state_dir, instance_id)
            directory = instances / instance_id
            directory.mkdir(mode=0o700)
            (directory / "contexts").mkdir(mode=0o700)
            (directory / "containers").mkdir(mode=0o700)
            (directory / "sandboxes").mkdir(mode=0o711)
        except OSError as error:
            raise MachineError(
                f"the state directory {str(state_dir)!r} cannot be used ({error.strerror}): "
                "set RLM_STATE_DIR to one that can"
            ) from error
        uids = stack.enter_context(claim_uids(uids_dir)) if os.geteuid() == 0 else None
        instance = Instance(instance_id, state_dir, uids)
        try:
            yield instance
        finally:
            if instance.alive or instance.leaked:
                forgetting.pop_all()
                shutil.rmtree(instance.contexts_dir, ignore_errors=True)


def dead_instances(state_dir: Path) -> list[InstanceId]:
    """The instances whose lock is free: their process is gone."""
    dead = []
    for path in sorted((state_dir / "instances").glob("i*.lock")):
        lock = try_lock(path)
        if lock is not None:
            os.close(lock)
            dead.append(InstanceId(path.stem))
    return dead


def forget_unborn(state_dir: Path) -> None:
    """Remove lock files whose process was killed before they had their name."""
    for path in (state_dir / "instances").glob("new-i*"):
        with suppress(FileNotFoundError):
            # A younger one may be about to be locked.
            if time.time() - path.stat().st_mtime > _UNBORN_FOR_S:
                path.unlink()


def living_instances(state_dir: Path, dead: Collection[InstanceId]) -> set[InstanceId]:
    """All instances but the dead ones."""
    return {InstanceId(path.stem) for path in (state_dir / "instances").glob("i*.lock")} - set(dead)


def containers_of(state_dir: Path, instance_id: InstanceId) -> Mapping[SandboxId, str]:
    """What the engine called the sandboxes of an instance that are not confirmed gone."""
    containers = {}
    for path in (state_dir / "instances" / instance_id / "containers").glob("s*"):
        with suppress(FileNotFoundError):
            containers[SandboxId(path.name)] = path.read_text(encoding="ascii")
    return containers


def forget_instance(state_dir: Path, instance_id: InstanceId) -> None:
    """Remove what a dead instance left in the state directory."""
    shutil.rmtree(state_dir / "instances" / instance_id, ignore_errors=True)
    (state_dir / "instances" / f"{instance_id}.lock").unlink(missing_ok=True)


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
