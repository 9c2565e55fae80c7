"""Archives for tests, honest and other."""

import io
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.errors import ContextInputError
from orchestrator.ids import LOCAL_TENANT
from tests.open_files import nothing_left_open

Stage = Callable[..., StagedContext]
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.size = len(content)
    return info, content


def write_tar(path: Path, members: Sequence[Member], *, compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression}") as tar:  # type: ignore[call-overload] # any of its compressions
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_of(path: Path, files: Mapping[str, bytes], *, compression: str = "") -> Path:
    return write_tar(path, [member(*item) for item in files.items()], compression=compression)


def zip_of(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    pairs = list(files.items()) if isinstance(files, Mapping) else files
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in pairs:
            archive.writestr(name, content)
    return path


def header(name: str, *, size: int = 0, kind: bytes = b"0", raw_size: bytes | None = None) -> bytes:
    """A tar header, whatever its size says."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = raw_size if raw_size is not None else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


TAR_END = bytes(1024)


@contextmanager
def staging(directory: Path) -> Iterator[Stage]:
    """Stages paths; afterwards nothing of a refused one is left, and nothing beside the store has changed."""
    contexts = ContextStore(directory / "store")
    canary = directory / "canary"
    canary.write_text("outside")
    staged: list[StagedContext] = []
    children_before = _children()

    def stage_paths(*paths: Path, cancelled: Callable[[], bool] = lambda: False) -> StagedContext:
        staged.append(contexts.stage_paths(LOCAL_TENANT, paths, cancelled=cancelled))
        return staged[-1]

    with nothing_left_open():
        yield stage_paths
    kept = {path for context in staged for path in context.files}
    assert {path for path in (directory / "store").rglob("*") if path.is_file()} == kept
    assert canary.read_text() == "outside"
    assert _children() == children_before, "the process that reads archives is still there"


def texts(context: StagedContext) -> dict[str, bytes]:
    """Each text of a context by its path, in its order."""
    blob = context.files.blob.read_bytes()
    return {
        entry.path: blob[entry.offset : entry.offset + entry.length_bytes]
        for entry in context.manifest.entries
    }


def assert_refused(stage: Stage, path: Path, why: str) -> None:
    """With one sentence that names it, and soon."""
    started_s = time.monotonic()
    with pytest.raises(ContextInputError, match=why) as refused:
        stage(path)
    assert str(refused.value).startswith(f"'{path}' ")
    assert "\n" not in str(refused.value)
    assert time.monotonic() - started_s < 20


def _children() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }
