"""Contexts as clients bring them: files of the state directory, until a run stages them.

`<state_dir>/service/contexts/<hash of the tenant>/<context id>[.zip ...]`. No name of a user's is part of a
path; of an archive's name its form is, because staging goes by it. Files are opened below a descriptor of
their directory, without following links, and made anew (O_EXCL).

Rules:

1. A file without a row is nobody's, and is removed when the server starts. An upload's row comes before its
   file, and goes before it, with a note in the same transaction that the file is to go (`bury`): any server
   may delete a context. Without its file an upload stands at 0 bytes. A text that came with a question has
   its row when all of it is there.
2. An upload takes bytes where it stands and nowhere else, and hashes them as they come. After a restart what
   is there is read once more.
3. A context is complete when all bytes are there, their hash is the one that was said, and they are on the
   disk. Before, a power cut may cost bytes that were told of: the hash finds out, and the upload is dropped.
"""

import asyncio
import hashlib
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.contexts import archives
from orchestrator.errors import (
    ConflictError,
    ContextInputError,
    HashMismatchError,
    InvalidRequestError,
    StoreError,
)
from orchestrator.ids import TenantId, new_context_id
from orchestrator.service.port import Upload
from orchestrator.service.rules import MAX_NAME_BYTES
from orchestrator.shielding import run_shielded
from orchestrator.store.books import AuditRow, ContextBook, ContextRow, DoomedContext

MAX_PART_BYTES = 1024 * 1024
_HASHES_KEPT = 256
"""Uploads whose hash goes on in memory; another one's bytes are read once more."""
_READ_BYTES = 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = {"zip": ".zip", "tar": ".tar", "tar.gz": ".tar.gz", "tar.bz2": ".tar.bz2", "tar.xz": ".tar.xz",
           "zst": ".tar.zst"}  # fmt: skip
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Hash:
    """What is there of an upload."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.length_bytes = 0

    def add(self, data: bytes) -> None:
        self.sha256.update(data)
        self.length_bytes += len(data)


@dataclass(slots=True)
class _Door:
    """One at a time writes to an upload."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class ContextDesk:
    """Takes contexts in and hands them out, as files."""

    def __init__(self, root: Path, book: ContextBook, *, home: str) -> None:
        """Makes `root` if it is missing.

        Args:
            root: This server's alone.
            book: Where the rows are.
            home: The id of this state directory.

        Raises:
            StoreError: The directory cannot be made.
        """
        self._root = root
        self._book = book
        self._home = home
        self._hashes: OrderedDict[str, _Hash] = OrderedDict()
        self._doors: dict[str, _Door] = {}
        self._needed: Counter[str] = Counter()
        with _writing():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- In -------------------------------------------------------------------------------------------

    async def start(
        self, tenant: TenantId, *, sha256: str, length_bytes: int, name: str, max_bytes: int
    ) -> Upload:
        """Begin an upload, or take up the one with the same hash, length and name.

        Raises:
            InvalidRequestError: No hash, no length or no name.
            BudgetExceededError: More than the tenant may keep.
            HashMismatchError: All bytes had come before, and are not what was said.
            StoreError: The disk or the database does not take it.
        """
        if not _SHA256.fullmatch(sha256):
            raise InvalidRequestError("sha256 must be 64 lower-case hex digits")
        if length_bytes < 1:
            raise InvalidRequestError("the context is empty")
        if not name or len(name.encode(errors="replace")) > MAX_NAME_BYTES or not name.isprintable():
            raise InvalidRequestError(f"name must have 1 to {MAX_NAME_BYTES} bytes of printable text")
        return await self._begin(tenant, sha256, length_bytes, name, max_bytes)

    async def write(self, row: ContextRow, offset: int, data: bytes) -> Upload:
        """Add bytes to an upload. Those of one part are added together or not at all.

        Raises:
            ContextInputError: They don't begin where it stands, or pass its length.
            InvalidRequestError: The part is too long.
            ConflictError: The upload is complete, or is no upload to this server.
            HashMismatchError: They were the last, and the whole is not what was said. It is dropped.
            StoreError: The disk or the database does not take it.
        """
        if len(data) > MAX_PART_BYTES:
            raise InvalidRequestError(f"a part has more than {MAX_PART_BYTES:,} bytes")
        if row.home != self._home:
            raise ConflictError("this upload was begun on another server")
        if row.is_complete:
            raise ConflictError("this upload is complete")
        return await run_shielded(self._write(row, offset, data))

    async def keep_text(self, tenant: TenantId, text: bytes, *, max_bytes: int) -> ContextRow:
        """A text that came with a question, kept until no run needs it. Also when its task is cancelled.

        Raises:
            InvalidRequestError: It is empty.
            BudgetExceededError: More than the tenant may keep.
            StoreError: The disk or the database does not take it.
        """
        if not text:
            raise InvalidRequestError("the context is empty")
        return await run_shielded(self._keep_text(tenant, text, max_bytes))

    # --- Out ------------------------------------------------------------------------------------------

    def path(self, row: ContextRow) -> Path:
        """The file of a complete context, for staging."""
        return self._directory(row.tenant_id) / _file_name(row)

    async def remove(self, row: ContextRow, *, audit: AuditRow | None = None) -> bool:
        """Remove a context for good; False when it was not there. The file of another server's goes when that
        one looks after its doomed contexts.

        Raises:
            ConflictError: A run that has not ended needs it, or is just being created.
            StoreError: The disk or the database does not answer.
        """
        if self._needed[row.context_id]:
            raise ConflictError("a run that has not ended needs this context")
        if not await self._book.delete(row.tenant_id, row.context_id, audit=audit):
            return False
        await self.bury()
        return True

    async def bury(self) -> Sequence[DoomedContext]:
        """Remove the files of contexts that were deleted, by whichever server; of which.

        Raises:
            StoreError: The disk or the database does not answer. They stay doomed.
        """
        doomed = await self._book.doomed(self._home)
        for context in doomed:
            self._hashes.pop(context.context_id, None)
            await asyncio.to_thread(self._unlink, context)
        await self._book.buried([context.context_id for context in doomed])
        return doomed

    @contextmanager
    def needed(self, context_id: str) -> Iterator[None]:
        """Nobody removes it within the block, in which a run about it is being stored."""
        self._needed[context_id] += 1
        try:
            yield
        finally:
            self._needed[context_id] -= 1
            if not self._needed[context_id]:
                del self._needed[context_id]

    async def has_files(self) -> bool:
        """Whether anybody's context is here, known or not."""
        return await asyncio.to_thread(self._has_files)

    async def sweep(self) -> int:
        """Remove files without a row, which a killed server left; how many. Before anything is uploaded."""
        rows = await self._book.all_of(self._home)
        return await asyncio.to_thread(self._sweep, {str(self.path(row)) for row in rows})

    # --- Inside ---------------------------------------------------------------------------------------

    async def _begin(
        self, tenant: TenantId, sha256: str, length_bytes: int, name: str, max_bytes: int
    ) -> Upload:
        row = ContextRow(
            context_id=new_context_id(),
            tenant_id=tenant,
            name=name,
            sha256=sha256,
            length_bytes=length_bytes,
            home=self._home,
            created_at=time.time(),
            is_complete=False,
            is_inline=not name,
        )
        stored = await self._book.begin(row, max_bytes=max_bytes)
        if stored.is_complete:
            return Upload(context=stored, next_offset=stored.length_bytes)
        return await run_shielded(self._write(stored, None, b""))

    async def _keep_text(self, tenant: TenantId, text: bytes, max_bytes: int) -> ContextRow:
        """The file first, for once: so the row is written once, and whole. Killed between: see rule 1."""
        row = ContextRow(
            context_id=new_context_id(),
            tenant_id=tenant,
            name="",
            sha256=await asyncio.to_thread(lambda: hashlib.sha256(text).hexdigest()),
            length_bytes=len(text),
            home=self._home,
            created_at=time.time(),
            is_complete=True,
            is_inline=True,
        )
        stored = None
        try:
            await asyncio.to_thread(self._store_text, row, text)
            stored = await self._book.begin(row, max_bytes=max_bytes)
        finally:
            if stored is None or stored.context_id != row.context_id:
                await asyncio.to_thread(self._unlink, row)
        return stored

    async def _write(self, row: ContextRow, offset: int | None, data: bytes) -> Upload:
        """Add bytes; at no offset in particular: only finish what has all its bytes."""
        with self._door(row.context_id) as lock:
            async with lock:
                stands = await self._stands(row)
                if offset is not None and offset != stands.length_bytes:
                    raise ContextInputError(f"the upload stands at byte {stands.length_bytes}, not {offset}")
                if stands.length_bytes + len(data) > row.length_bytes:
                    raise ContextInputError(f"the upload would be longer than {row.length_bytes} bytes")
                if data:
                    await asyncio.to_thread(self._append, row, stands, data)
                if stands.length_bytes == row.length_bytes:
                    row = await self._complete(row, stands)
                return Upload(context=row, next_offset=stands.length_bytes)

    async def _complete(self, row: ContextRow, stands: _Hash) -> ContextRow:
        self._hashes.pop(row.context_id, None)
        if stands.sha256.hexdigest() != row.sha256:
            await self._book.delete(row.tenant_id, row.context_id)
            await asyncio.to_thread(self._unlink, row)
            raise HashMismatchError("what was uploaded has another hash than was said; it was dropped")
        await asyncio.to_thread(self._make_durable, row)
        await self._book.complete(row.tenant_id, row.context_id)
        return replace(row, is_complete=True)

    async def _stands(self, row: ContextRow) -> _Hash:
        stands = self._hashes.get(row.context_id)
        if stands is None:
            stands = self._hashes[row.context_id] = await asyncio.to_thread(self._read, row)
        self._hashes.move_to_end(row.context_id)
        while len(self._hashes) > _HASHES_KEPT:
            self._hashes.popitem(last=False)
        return stands

    @contextmanager
    def _door(self, context_id: str) -> Iterator[asyncio.Lock]:
        door = self._doors.setdefault(context_id, _Door())
        door.users += 1
        try:
            yield door.lock
        finally:
            door.users -= 1
            if not door.users:
                del self._doors[context_id]

    # --- Files; all of it blocks ----------------------------------------------------------------------

    def _directory(self, tenant: TenantId) -> Path:
        return self._root / hashlib.sha256(tenant.encode(errors="surrogatepass")).hexdigest()[:32]

    @contextmanager
    def _opened(self, tenant: TenantId, *, make: bool = False) -> Iterator[int]:
        directory = self._directory(tenant)
        if make:
            directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(directory, _DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read(self, row: ContextRow) -> _Hash:
        """What is there, hashed; a file is made when there is none."""
        stands = _Hash()
        with _writing(), self._opened(row.tenant_id, make=True) as directory:
            try:
                fd = os.open(_file_name(row), _NEW, mode=0o600, dir_fd=directory)
            except FileExistsError:
                fd = os.open(_file_name(row), _OLD, dir_fd=directory)
            with _closing(fd):
                while part := os.pread(fd, _READ_BYTES, stands.length_bytes):
                    stands.add(part)
        return stands

    def _append(self, row: ContextRow, stands: _Hash, data: bytes) -> None:
        with _writing(), self._opened(row.tenant_id) as directory:
            fd = os.open(_file_name(row), _OLD, dir_fd=directory)
            with _closing(fd):
                try:
                    written = 0
                    while written < len(data):
                        written += os.pwrite(fd, data[written:], stands.length_bytes + written)
                except OSError:
                    # The disk is full: what came of this part goes, so that it can be sent again.
                    with suppress(OSError):
                        os.ftruncate(fd, stands.length_bytes)
                    raise
        stands.add(data)

    def _store_text(self, row: ContextRow, text: bytes) -> None:
        with _writing(), self._opened(row.tenant_id, make=True) as directory:
            fd = os.open(_file_name(row), _NEW, mode=0o600, dir_fd=directory)
            with _closing(fd):
                written = 0
                while written < len(text):
                    written += os.write(fd, text[written:])
                os.fsync(fd)
            os.fsync(directory)

    def _make_durable(self, row: ContextRow) -> None:
        with _writing(), self._opened(row.tenant_id) as directory:
            fd = os.open(_file_name(row), _OLD, dir_fd=directory)
            with _closing(fd):
                os.fsync(fd)
            os.fsync(directory)

    def _unlink(self, row: ContextRow | DoomedContext) -> None:
        with _writing(), suppress(FileNotFoundError), self._opened(row.tenant_id) as directory:
            os.unlink(_file_name(row), dir_fd=directory)
            os.fsync(directory)

    def _has_files(self) -> bool:
        with _writing():
            return any(any(directory.iterdir()) for directory in self._root.iterdir())

    def _sweep(self, known: set[str]) -> int:
        removed = 0
        with _writing():
            for directory in self._root.iterdir():
                for file in directory.iterdir():
                    if str(file) not in known:
                        file.unlink()
                        removed += 1
                with suppress(OSError):
                    directory.rmdir()  # unless something is in it
        return removed


def _file_name(row: ContextRow | DoomedContext) -> str:
    form = archives.form_of(os.fsencode(row.name)) if row.name else None
    return row.context_id + (_SUFFIX[form] if form else "")


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"the state directory does not take a context: {error.strerror}") from error
