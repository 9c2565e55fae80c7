"""The contexts of one orchestrator instance: each stored once per tenant, put into sandboxes by hard link.

A private directory with one directory per tenant, named by hash so that no tenant's name is part of a path.
In it: `b-<sha256>` blobs, `m-<sha256>` manifests in the guest's form, `t-<random>` files still being written.
Tenants share nothing, so nobody learns from a saving that another tenant has the same text.

All of it is synchronous and may be called from any thread; staging and deriving read files and take a while.
"""

import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.contexts.ingest import Identity, Notes, Reader, find_sources, kind_of
from orchestrator.contexts.manifest import SHAPE_NAME_CHARS, Manifest, Measured
from orchestrator.contexts.normalise import REPLACEMENT_BYTES, Normaliser
from orchestrator.contexts.staging import (
    CHUNK_BYTES,
    BlobWriter,
    Cancelled,
    cannot_write,
    check_cancelled,
    never,
)
from orchestrator.errors import (
    BudgetExceededError,
    ContextInputError,
    InvalidRequestError,
    InvariantError,
    MachineError,
)
from orchestrator.ids import TenantId
from orchestrator.limits import MAX_CONTEXT_FILES, MAX_UPLOAD_BYTES
from orchestrator.visible import visible_line

BLOB_NAME = "blob"
"""What the guest finds the texts as ..."""
MANIFEST_NAME = "manifest.json"
"""... and, put there last, what they are."""
MAX_CONTEXT_BYTES = 64 * 1024 * 1024 * 1024
"""One context from the host's file system. Stops a sparse file or an endless one before the disk is full."""
MAX_UPLOAD_PATH_BYTES = 4_096
"""Of each file name in an upload: what Linux allows a path."""


@dataclass(frozen=True, eq=False)
class StagedContext:
    """One reference to a context in the store, until `ContextStore.release`."""

    tenant: TenantId
    manifest: Manifest
    notes: tuple[str, ...]
    """For a person, one sentence each: what was left out, renamed or replaced."""
    _blob: Path
    _guest_manifest: Path

    @property
    def content_id(self) -> str:
        """Hex digest of what the context says."""
        return self.manifest.content_id


class ContextStore:
    """The contexts of one orchestrator instance."""

    def __init__(self, root: Path) -> None:
        """Makes `root` if it is missing.

        Args:
            root: This instance's own directory, on the file system where the sandboxes' directories are.

        Raises:
            MachineError: It cannot be made, or somebody else can reach into it.
        """
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            status = root.lstat()
        except OSError as error:
            raise cannot_write(error) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise MachineError(
                f"the context store {root} must be a directory of this user with mode 0700; remove or mend it"
            )
        self._root = root
        self._identity = Identity(status.st_dev, status.st_ino)
        # Guards the two below and the renaming and removing that must agree with them.
        self._lock = threading.Lock()
        self._uses: dict[Path, int] = {}
        self._live: set[StagedContext] = set()

    def stage_paths(
        self, tenant: TenantId, paths: Sequence[Path], *, cancelled: Cancelled = never
    ) -> StagedContext:
        """A context of the host's files: one file is a text; a directory, archive or several paths are files.

        What is read, what is left out and how files are named is said in `ingest`.

        Raises:
            ContextInputError: A path is missing, unreadable, empty, of another kind or given twice; or the
                context is too large.
            MachineError: The store cannot be written.
            RunCancelledError: `cancelled` said so.
        """
        sources = find_sources(paths)
        notes = Notes()
        with BlobWriter(self._tenant_directory(tenant), kind_of(sources)) as writer:
            reader = Reader(
                writer,
                notes,
                cancelled,
                leave_out=self._identity,
                max_files=MAX_CONTEXT_FILES,
                max_bytes=MAX_CONTEXT_BYTES,
            )
            manifest = writer.seal(reader.read(sources))
            if writer.first_replaced is not None:
                position, byte = writer.first_replaced
                notes.add(_replaced_note(manifest, byte, reader.place_of(position)))
            return self._publish(tenant, writer, manifest, notes.all())

    def stage_text(self, tenant: TenantId, text: bytes, *, cancelled: Cancelled = never) -> StagedContext:
        """A context of one text that is in memory.

        Raises:
            ContextInputError: It is empty.
            MachineError: The store cannot be written.
            RunCancelledError: `cancelled` said so.
        """
        with BlobWriter(self._tenant_directory(tenant), "text") as writer:
            writer.begin()
            for start in range(0, len(text), CHUNK_BYTES):
                check_cancelled(cancelled)
                writer.write(text[start : start + CHUNK_BYTES])
            writer.end()
            if writer.length_bytes == 0:
                raise ContextInputError("the context is empty")
            manifest = writer.seal()
            notes: tuple[str, ...] = ()
            if writer.first_replaced is not None:
                notes = (_replaced_note(manifest, writer.first_replaced[1], "the context"),)
            return self._publish(tenant, writer, manifest, notes)

    def upload(
        self, tenant: TenantId, *, max_bytes: int = MAX_UPLOAD_BYTES, max_files: int = MAX_CONTEXT_FILES
    ) -> "Upload":
        """A context that comes in parts. Use it in a `with` block: its end drops what was not finished.

        Args:
            tenant: Whose it is.
            max_bytes: What its run may still upload.
            max_files: Files in it.
        """
        return Upload(self, tenant, max_bytes=max_bytes, max_files=max_files)

    def derive_range(
        self,
        context: StagedContext,
        path: str,
        start_byte: int,
        end_byte: int,
        *,
        cancelled: Cancelled = never,
    ) -> StagedContext:
        """A range of one of a context's texts as a context of its own. Reads the range, copies nothing.

        Args:
            context: Not yet released. The new one does not depend on it any more.
            path: Of the text; empty when the context is one text.
            start_byte: First byte, at the start of a character.
            end_byte: One past the last byte, at the start of a character or the end of the text.
            cancelled: Asked between chunks.

        Raises:
            ContextInputError: The context has no such text or range.
            InvalidRequestError: The range is empty or splits a character.
            RunCancelledError: `cancelled` said so.
        """
        entry = context.manifest.range_entry(path, start_byte, end_byte)
        if end_byte - start_byte == entry.length_bytes:
            measured = entry.measured
        else:
            measured, marks = _measure(
                context._blob, entry.offset + start_byte, entry.offset + end_byte, cancelled
            )
            if measured.replaced:
                raise InvalidRequestError(
                    f"the range from byte {start_byte} to {end_byte} splits a character; give whole ones"
                )
            if entry.measured.replaced:
                # Which of them the input had already is not known any more.
                measured = measured._replace(replaced=min(entry.measured.replaced, marks))
        return self._derive(context, context.manifest.text_range(path, start_byte, end_byte, measured))

    def derive_paths(self, context: StagedContext, paths: Sequence[str]) -> StagedContext:
        """Some files of a context as a context of their own. Reads nothing, copies nothing.

        Raises:
            ContextInputError: The context has no such file.
            InvalidRequestError: No file was named, or one twice.
        """
        return self._derive(context, context.manifest.subset(paths))

    def link_into(self, context: StagedContext, directory: Path) -> None:
        """Puts a context into a sandbox's directory: two hard links, the manifest last.

        Whoever sees the manifest can read the blob. What was there under these names is replaced.

        Args:
            context: Not yet released. The links outlive its release.
            directory: On the store's file system, and not writable by any guest.

        Raises:
            MachineError: The links cannot be made.
        """
        with self._lock:
            self._check_live(context)
        try:
            target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _link(context._blob, target, BLOB_NAME)
                _link(context._guest_manifest, target, MANIFEST_NAME)
            finally:
                os.close(target)
        except OSError as error:
            raise cannot_write(error) from error

    def release(self, context: StagedContext) -> None:
        """Gives a reference back; the last one takes blob and manifest with it. Harmless when repeated."""
        with self._lock:
            if context not in self._live:
                return
            self._live.remove(context)
            doomed = [self._give_back(path) for path in (context._blob, context._guest_manifest)]
        _remove(doomed)

    def close(self) -> None:
        """Removes everything, the root included."""
        with self._lock:
            self._live.clear()
            self._uses.clear()
            shutil.rmtree(self._root, ignore_errors=True)

    # --- Inside ---------------------------------------------------------------------------------------

    def _tenant_directory(self, tenant: TenantId) -> Path:
        directory = self._root / hashlib.sha256(tenant.encode(errors="surrogatepass")).hexdigest()[:32]
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise cannot_write(error) from error
        return directory

    def _publish(
        self, tenant: TenantId, writer: BlobWriter, manifest: Manifest, notes: tuple[str, ...]
    ) -> StagedContext:
        """Takes over a sealed file under its hash, or forgets it if that is there already."""
        blob = writer.path.with_name(f"b-{manifest.sha256}")
        guest_manifest = self._write_guest_manifest(blob.parent, manifest)
        staged = StagedContext(tenant, manifest, notes, blob, guest_manifest[1])
        with self._lock:
            self._take(blob, writer.path)
            self._take(guest_manifest[1], guest_manifest[0])
            self._live.add(staged)
        return staged

    def _derive(self, context: StagedContext, manifest: Manifest) -> StagedContext:
        temporary, final = self._write_guest_manifest(context._blob.parent, manifest)
        derived = StagedContext(context.tenant, manifest, (), context._blob, final)
        with self._lock:
            try:
                self._check_live(context)
            except InvariantError:
                temporary.unlink()
                raise
            self._uses[context._blob] += 1
            self._take(final, temporary)
            self._live.add(derived)
        return derived

    def _write_guest_manifest(self, directory: Path, manifest: Manifest) -> tuple[Path, Path]:
        """Writes the guest's form to a temporary file; that file and what it shall be called."""
        content = manifest.for_guest()
        temporary = directory / f"t-{secrets.token_hex(16)}"
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o444)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(error) from error
        return temporary, directory / f"m-{hashlib.sha256(content).hexdigest()}"

    def _take(self, path: Path, temporary: Path) -> None:
        """One more use of a stored file, which the temporary one becomes or makes way for. Under the lock."""
        try:
            if path in self._uses:
                temporary.unlink()
            else:
                temporary.rename(path)
        except OSError as error:
            raise cannot_write(error) from error
        self._uses[path] = self._uses.get(path, 0) + 1

    def _give_back(self, path: Path) -> Path | None:
        """One use less. If it was the last: the file to be removed, already renamed. Under the lock."""
        self._uses[path] -= 1
        if self._uses[path]:
            return None
        del self._uses[path]
        # Freeing gigabytes takes a while, and is done outside the lock.
        doomed = path.with_name(f"t-{secrets.token_hex(16)}")
        path.rename(doomed)
        return doomed

    def _check_live(self, context: StagedContext) -> None:
        if context not in self._live:
            raise InvariantError("a context was used after its release")


class Upload:
    """One upload on its way in: either one text, or files one after the other."""

    def __init__(self, store: ContextStore, tenant: TenantId, *, max_bytes: int, max_files: int) -> None:
        self._store = store
        self._tenant = tenant
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._directory = store._tenant_directory(tenant)
        self._writer: BlobWriter | None = None
        self._paths: set[str] = set()
        self._names: list[str] = []
        self._received_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def start_file(self, raw_path: bytes) -> None:
        """The next file. What is written from here on belongs to it.

        Raises:
            InvalidRequestError: The path is not UTF-8, too long, empty, absolute, has an empty part, `.` or
                `..` in it, or came before; or a text was begun.
            BudgetExceededError: One file too many.
        """
        path = _checked_upload_path(raw_path)
        if self._writer is None:
            self._writer = BlobWriter(self._directory, "files")
        elif not self._paths:
            raise InvalidRequestError("an upload that began as one text cannot go on with files")
        else:
            self._writer.end()
        if path in self._paths:
            raise InvalidRequestError(f"the path '{visible_line(path, SHAPE_NAME_CHARS)}' was uploaded twice")
        if len(self._paths) >= self._max_files:
            unit = "files of an upload"
            raise BudgetExceededError("run", {unit: self._max_files + 1}, {unit: self._max_files})
        self._paths.add(path)
        self._writer.begin(path)

    def write(self, data: bytes) -> None:
        """A part of the file begun last, or of the one text.

        Raises:
            BudgetExceededError: More bytes than the run may still upload.
            MachineError: The store cannot be written.
        """
        self._received_bytes += len(data)
        self._check_bytes(self._received_bytes)
        if self._writer is None:
            self._writer = BlobWriter(self._directory, "text")
            self._writer.begin()
        self._writer.write(data)
        # A byte that is not UTF-8 becomes three.
        self._check_bytes(self._writer.length_bytes)

    def finish(self) -> StagedContext:
        """The whole upload as a context.

        Raises:
            InvalidRequestError: Nothing was sent.
            MachineError: The store cannot be written.
        """
        if self._writer is None:
            raise InvalidRequestError("nothing was uploaded")
        self._writer.end()
        if self._writer.length_bytes == 0:
            raise InvalidRequestError("nothing was uploaded but empty texts")
        manifest = self._writer.seal()
        notes: tuple[str, ...] = ()
        if self._writer.first_replaced is not None:
            position, byte = self._writer.first_replaced
            name = manifest.entries[position].path
            place = f"'{visible_line(name, SHAPE_NAME_CHARS)}'" if name else "the context"
            notes = (_replaced_note(manifest, byte, place),)
        return self._store._publish(self._tenant, self._writer, manifest, notes)

    def abort(self) -> None:
        """Drops what was not finished. Harmless after `finish`, and when repeated."""
        if self._writer is not None:
            self._writer.discard()

    def _check_bytes(self, length_bytes: int) -> None:
        if length_bytes > self._max_bytes:
            unit = "bytes of uploads"
            raise BudgetExceededError("run", {unit: length_bytes}, {unit: self._max_bytes})


def _checked_upload_path(raw_path: bytes) -> str:
    try:
        path = raw_path.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("the path of an uploaded file is not UTF-8") from error
    if len(raw_path) > MAX_UPLOAD_PATH_BYTES or "\0" in path:
        raise InvalidRequestError("the path of an uploaded file is too long or has a NUL in it")
    # An absolute path starts with an empty part, and so does an empty one.
    if {"", ".", ".."} & set(path.split("/")):
        raise InvalidRequestError(
            f"'{visible_line(path, SHAPE_NAME_CHARS)}' is no relative path without empty parts, '.' and '..'"
        )
    return path


def _replaced_note(manifest: Manifest, byte: int, place: str) -> str:
    count = sum(entry.measured.replaced for entry in manifest.entries)
    times = "once" if count == 1 else f"{count:,} times"
    return f"bytes that are not UTF-8 were replaced by U+FFFD {times}, first at byte {byte:,} of {place}"


def _measure(blob: Path, start: int, end: int, cancelled: Cancelled) -> tuple[Measured, int]:
    """What a pass over a part of a blob finds, and how many U+FFFD are in it."""
    # Mid-text, U+FEFF is a character, not a byte order mark.
    text = Normaliser(strip_bom=False)
    marks = 0
    with open(blob, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            check_cancelled(cancelled)
            chunk = file.read(min(CHUNK_BYTES, end - start))
            if not chunk:
                raise InvariantError("a blob of the context store is shorter than its manifest says")
            start += len(chunk)
            marks += text.feed(chunk).count(REPLACEMENT_BYTES)
    text.finish()
    return text.measured(), marks


def _link(source: Path, directory: int, name: str) -> None:
    temporary = f".{name}.{secrets.token_hex(8)}"
    os.link(source, temporary, dst_dir_fd=directory, follow_symlinks=False)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    # Renaming one link over another of the same file does nothing and leaves both.
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)


def _remove(paths: Sequence[Path | None]) -> None:
    for path in paths:
        if path is not None:
            path.unlink(missing_ok=True)
