"""The contexts of one orchestrator instance: each stored once per tenant, put into sandboxes by hard link.

A private directory with one directory per tenant, named by hash so that no tenant's name is part of a path.
In it: `b-<sha256>` blobs, `l-<sha256>` their landmarks, `m-<sha256>` manifests in the guest's form, and
files still being written, `t-<random>`. Tenants share nothing, so nobody learns from a saving that another
tenant has the same text.

All of it is synchronous and may be called from any thread; staging reads files and takes a while.
"""

import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from orchestrator.contexts.guest_form import encode_manifest
from orchestrator.contexts.ingest import Identity, Notes, Reader, find_sources, kind_of
from orchestrator.contexts.landmarks import Landmarks
from orchestrator.contexts.manifest import SHAPE_NAME_CHARS, Entry, Manifest, Measured
from orchestrator.contexts.normalise import REPLACEMENT_BYTES
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
LANDMARKS_NAME = "landmarks"
"""... where characters and lines are in them ..."""
MANIFEST_NAME = "manifest"
"""... and, put there last, what they are."""
MAX_CONTEXT_BYTES = 64 * 1024 * 1024 * 1024
"""One context from the host's file system. Stops a sparse file or an endless one before the disk is full."""
MAX_UPLOAD_PATH_BYTES = 4_096
"""Of each file name in an upload: what Linux allows a path."""


class StoredFiles(NamedTuple):
    """What of the store a context stands on."""

    blob: Path
    landmarks: Path
    manifest: Path


@dataclass(frozen=True, eq=False)
class StagedContext:
    """One reference to a context in the store, until `ContextStore.release`."""

    tenant: TenantId
    manifest: Manifest
    notes: tuple[str, ...]
    """For a person, one sentence each: what was left out, renamed or replaced."""
    files: StoredFiles
    """Not for writing: sandboxes see the same files."""

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
        """A range of one of a context's texts as a context of its own. Copies nothing, reads next to nothing.

        Args:
            context: Not yet released. The new one does not depend on it any more.
            path: Of the text; empty when the context is one text.
            start_byte: First byte, at the start of a character.
            end_byte: One past the last byte, at the start of a character or the end of the text.
            cancelled: Asked between chunks of a text in which bytes were replaced: only such a range is read.

        Raises:
            ContextInputError: The context has no such text or range.
            InvalidRequestError: The range is empty or splits a character.
            RunCancelledError: `cancelled` said so.
        """
        entry = context.manifest.range_entry(path, start_byte, end_byte)
        if end_byte - start_byte == entry.length_bytes:
            measured = entry.measured
        else:
            measured = _measure(context, entry, start_byte, end_byte, cancelled)
        return self._derive(context, context.manifest.text_range(path, start_byte, end_byte, measured))

    def derive_paths(self, context: StagedContext, paths: Sequence[str]) -> StagedContext:
        """Some files of a context as a context of their own. Reads nothing, copies nothing.

        Raises:
            ContextInputError: The context has no such file.
            InvalidRequestError: No file was named, or one twice.
        """
        return self._derive(context, context.manifest.subset(paths))

    def derive_files(self, context: StagedContext, runs: Sequence[tuple[int, int]]) -> StagedContext:
        """As `derive_paths`, by number: runs of files, each the number of the first and how many they are.

        Raises:
            ContextInputError: The context has no such files.
            InvalidRequestError: No file was named, or one twice.
        """
        return self._derive(context, context.manifest.runs(runs))

    def share(self, context: StagedContext) -> StagedContext:
        """Another reference to a context, in constant time.

        Args:
            context: Not yet released. The new one does not depend on it any more, and has no notes.
        """
        shared = replace(context, notes=())
        with self._lock:
            self._check_live(context)
            for path in shared.files:
                self._uses[path] += 1
            self._live.add(shared)
        return shared

    def link_into(self, context: StagedContext, directory: Path) -> None:
        """Puts a context into a sandbox's directory: three hard links, the manifest last.

        Whoever sees the manifest can read the others. What was there under these names is replaced.

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
                _link(context.files.blob, target, BLOB_NAME)
                _link(context.files.landmarks, target, LANDMARKS_NAME)
                _link(context.files.manifest, target, MANIFEST_NAME)
            finally:
                os.close(target)
        except OSError as error:
            raise cannot_write(error) from error

    def release(self, context: StagedContext) -> None:
        """Gives a reference back; the last one takes the files with it. Harmless when repeated."""
        with self._lock:
            if context not in self._live:
                return
            self._live.remove(context)
            doomed = [self._give_back(path) for path in context.files]
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
        directory = writer.path.parent
        encoded = encode_manifest(manifest)
        # Landmarks go by the blob's name: whatever others there are for the same blob do as well.
        files = StoredFiles(
            directory / f"b-{manifest.sha256}", directory / f"l-{manifest.sha256}", _named(directory, encoded)
        )
        staged = StagedContext(tenant, manifest, notes, files)
        with (
            _temporary(directory, writer.landmarks()) as landmarks,
            _temporary(directory, encoded) as guest_manifest,
            self._lock,
        ):
            self._take(files.blob, writer.path)
            self._take(files.landmarks, landmarks)
            self._take(files.manifest, guest_manifest)
            self._live.add(staged)
        return staged

    def _derive(self, context: StagedContext, manifest: Manifest) -> StagedContext:
        if manifest == context.manifest:
            return self.share(context)
        directory = context.files.blob.parent
        encoded = encode_manifest(manifest)
        files = context.files._replace(manifest=_named(directory, encoded))
        derived = StagedContext(context.tenant, manifest, (), files)
        with _temporary(directory, encoded) as guest_manifest, self._lock:
            self._check_live(context)
            self._uses[files.blob] += 1
            self._uses[files.landmarks] += 1
            self._take(files.manifest, guest_manifest)
            self._live.add(derived)
        return derived

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


def _measure(
    context: StagedContext, entry: Entry, start_byte: int, end_byte: int, cancelled: Cancelled
) -> Measured:
    """What is in a part of a text: counted from landmark to landmark, read only at its ends."""
    start, end = entry.offset + start_byte, entry.offset + end_byte
    with open(context.files.blob, "rb", buffering=0) as blob:

        def read(first: int, last: int) -> bytes:
            part = os.pread(blob.fileno(), last - first, first)
            if len(part) != last - first:
                raise InvariantError("a blob of the context store is shorter than its manifest says")
            return part

        for edge, edge_byte in ((start, start_byte), (end, end_byte)):
            if edge_byte < entry.length_bytes and 0x80 <= read(edge, edge + 1)[0] < 0xC0:
                raise InvalidRequestError(
                    f"the range from byte {start_byte} to {end_byte} splits a character; give whole ones"
                )
        counted = Landmarks(context.files.landmarks.read_bytes()).count(read, start, end)
        ends_line = read(end - 1, end) == b"\n"
        replaced = entry.measured.replaced
        if replaced:
            # Which of the marks in it the input had already is not known any more.
            replaced = min(replaced, _marks(read, start, end, cancelled))
    return Measured(
        length_bytes=end - start,
        chars=counted.chars,
        lines=counted.newlines + (not ends_line),
        width=counted.width,
        replaced=replaced,
        sha256=_part_id(context.manifest.sha256, start, end),
    )


def _marks(read: Callable[[int, int], bytes], start: int, end: int, cancelled: Cancelled) -> int:
    """How many U+FFFD there are from one byte to another."""
    marks = 0
    for at in range(start, end, CHUNK_BYTES):
        check_cancelled(cancelled)
        overlap = len(REPLACEMENT_BYTES) - 1
        marks += read(at, min(at + CHUNK_BYTES + overlap, end)).count(REPLACEMENT_BYTES)
    return marks


def _part_id(blob_sha256: str, start: int, end: int) -> str:
    """Stands for the hash of a part that was not read. No text has it as its own: texts hold no byte 255."""
    return hashlib.sha256(b"\xff%s %d %d" % (blob_sha256.encode(), start, end)).hexdigest()


def _named(directory: Path, encoded: bytes) -> Path:
    """What a manifest in the guest's form is called."""
    return directory / f"m-{hashlib.sha256(encoded).hexdigest()}"


@contextmanager
def _temporary(directory: Path, content: bytes) -> Iterator[Path]:
    """A read-only file, gone after the block unless it was renamed in it."""
    path = directory / f"t-{secrets.token_hex(16)}"
    try:
        try:
            with open(path, "xb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o444)
        except OSError as error:
            raise cannot_write(error) from error
        yield path
    finally:
        path.unlink(missing_ok=True)


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
