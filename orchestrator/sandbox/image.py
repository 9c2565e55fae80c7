"""The sandbox image: what it is built from, which image that is, and building it.

An image belongs to its sources. Their hash is its tag and its label, so an image of other sources is never
taken for this one, and sources that did not change are never built twice.

Nothing is fetched during the build. The base image is pulled, or made on this machine where no registry
answers; the wheels are downloaded before, checked against their hashes and kept in a wheelhouse. Filling that
folder by hand with the files of `requirements.txt` is all that a machine without network needs.
"""

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import RequestException

from orchestrator.errors import EngineError, ImageMissingError, InvalidRequestError

REPOSITORY = "rlm-sandbox"
BASE_REPOSITORY = "rlm-sandbox-base"
SOURCE_LABEL = "rlm.source"
PULLED_BASE = "python:3.11-slim-bookworm"

_RECIPE = ("Dockerfile", "prepare-root", "bootstrap-base", "requirements.txt")
_GUEST_PROTOS = ("types", "sandbox", "broker")
_WHEEL_PLATFORMS = {"amd64": "manylinux2014_x86_64", "arm64": "manylinux2014_aarch64"}

# The engine itself would try for minutes to reach a registry that is not there.
_REGISTRY_DEADLINE_S = 15.0
# Between two lines of a build: compiling the standard library is its longest silent step.
_BUILD_SILENCE_S = 600
_BOOTSTRAP_DEADLINE_S = 1_200.0
_DOWNLOAD_DEADLINE_S = 600.0

# Whole: an engine would take the first digits for any image that begins with them.
_PINNED = re.compile(r"([^\s@]+@)?sha256:[0-9a-f]{64}")

Say = Callable[[str], None]


def sources() -> dict[str, bytes]:
    """Everything the image is built from except base and wheels, by its path in the build context.

    Wheels are covered by the hashes in `requirements.txt`, the base by the script that makes it.

    Raises:
        ImageMissingError: This installation lacks the image's sources.
    """
    image, protos = _package("sandbox_image"), _package("rlm_proto")
    found = {name: image / name for name in _RECIPE}
    for path in sorted(image.rglob("*.py")):
        found[f"packages/sandbox_image/{path.relative_to(image).as_posix()}"] = path
    generated = [f"v1/{name}_pb2{part}.py" for name in _GUEST_PROTOS for part in ("", "_grpc")]
    for name in ("__init__.py", "v1/__init__.py", *generated):
        found[f"packages/rlm_proto/{name}"] = protos / name
    try:
        return {name: path.read_bytes() for name, path in found.items()}
    except OSError as error:
        raise ImageMissingError(f"this installation lacks a source of the sandbox image: {error}") from error


def source_hash(files: Mapping[str, bytes]) -> str:
    """The identity of an image built from these files: the same for any order of them, in 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(files):
        # Lengths first, so that no two different sets of files read as one sequence of bytes.
        digest.update(f"{len(name)} {len(files[name])} {name}".encode())
        digest.update(files[name])
    return digest.hexdigest()


def tag(source: str) -> str:
    """The name of the image with that source hash."""
    return f"{REPOSITORY}:{source[:12]}"


def find(client: docker.DockerClient) -> str:
    """The id (`sha256:...`) of the image of the present sources.

    Raises:
        ImageMissingError: There is none; the sentence says how to build it, and whether one of other
            sources is there.
        EngineError: The engine does not answer.
    """
    source = source_hash(sources())
    found = built_id(client, source)
    if found is not None:
        return found
    with engine_errors("look for the sandbox image"):
        stale = bool(client.images.list(name=REPOSITORY))
    state = "was built from other sources than these" if stale else "has not been built"
    raise ImageMissingError(f"the sandbox image {state}: run `rlm image build`")


def pinned(client: docker.DockerClient, reference: str) -> str:
    """The id of an image that is named by its id or digest.

    Raises:
        InvalidRequestError: It is named by a tag alone, which can change under a running pool.
        ImageMissingError: The engine does not have it.
        EngineError: The engine does not answer.
    """
    if not _PINNED.fullmatch(reference):
        raise InvalidRequestError(
            f"RLM_IMAGE must be an image id or digest (sha256: and 64 hexadecimal digits), not {reference!r}"
        )
    with engine_errors("look for the sandbox image"):
        try:
            found = str(client.images.get(reference).id)
        except ImageNotFound as error:
            raise ImageMissingError(
                f"the engine has no image {reference}: pull it, or unset RLM_IMAGE and run `rlm image build`"
            ) from error
    if reference.startswith("sha256:") and found != reference:
        raise EngineError(f"the engine answers to {reference} with another image, {found}")
    return found


def build(client: docker.DockerClient, *, wheelhouse: Path, say: Say) -> str:
    """Builds the image of the present sources, unless it is there, and returns its id (`sha256:...`).

    Blocks for seconds, or for minutes when the base has to be made. It is safe to repeat after any failure.

    Args:
        client: Its time-out is changed while this runs.
        wheelhouse: Where wheels are looked for before any is downloaded, and kept; made if missing.
        say: Told what is being done, a line at a time.

    Raises:
        ImageMissingError: Sources, wheels or base cannot be had on this machine.
        EngineError: The engine does not answer, or a step of the build failed in it.
    """
    files = sources()
    source = source_hash(files)
    found = built_id(client, source)
    if found is not None:
        say(f"image: {tag(source)} is there already")
        tag_as_latest(client, source)
        return found
    base = _ensure_base(client, files["bootstrap-base"], say)
    with tempfile.TemporaryDirectory(prefix="rlm-image-") as folder:
        context = Path(folder)
        _write_files(files, context)
        _collect_wheels(client, context, wheelhouse, say)
        say(f"image: building {tag(source)} without network")
        _build_context(client, context, base, source, say)
    built = built_id(client, source)
    if built is None:
        raise EngineError(f"the engine reported a finished build, but has no image {tag(source)}")
    tag_as_latest(client, source)
    say(f"image: {tag(source)} is built ({built})")
    return built


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes the files, readable for a guest with a uid of its own whatever the umask here."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755 if content.startswith(b"#!") else 0o644)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def _package(name: str) -> Path:
    """The folder of an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImageMissingError(f"the package {name}, a source of the sandbox image, is not installed")
    return Path(spec.submodule_search_locations[0])


def built_id(client: docker.DockerClient, source: str) -> str | None:
    """The id of the image with that source hash; None if the engine has none.

    Raises:
        EngineError: The engine does not answer.
    """
    with engine_errors("look for the sandbox image"):
        try:
            image = client.images.get(tag(source))
        except ImageNotFound:
            return None
    # The tag holds a part of the hash only, and anybody can set a tag.
    return image.id if image.labels.get(SOURCE_LABEL) == source else None


def base_name(recipe: bytes) -> str:
    """The name of the local base image that `bootstrap-base` with this content stands for."""
    return f"{BASE_REPOSITORY}:{hashlib.sha256(recipe).hexdigest()[:12]}"


def _ensure_base(client: docker.DockerClient, recipe: bytes, say: Say) -> str:
    """The name of the local base image: there already, or pulled, or made on this machine."""
    base = base_name(recipe)
    with engine_errors("look for the base image"):
        try:
            client.images.get(base)
        except ImageNotFound:
            pass
        else:
            return base
    say(f"image: pulling the base image {PULLED_BASE}")
    try:
        _pull(client, PULLED_BASE, base)
    except (DockerException, RequestException) as error:
        say(f"image: it cannot be pulled ({_first_line(error)})")
        _bootstrap(client, recipe, base, say)
    return base


def _pull(client: docker.DockerClient, name: str, base: str) -> None:
    with time_out(client, _REGISTRY_DEADLINE_S):
        client.images.get_registry_data(name)
    # A registry answers. From here on the client library sets no time-out, and progress takes what it takes.
    repository, version = name.rsplit(":", 1)
    client.images.pull(repository, tag=version).tag(base)


def _bootstrap(client: docker.DockerClient, recipe: bytes, base: str, say: Say) -> None:
    # Not the default place: that may be held in memory, and this is 160 MB.
    with tempfile.TemporaryDirectory(prefix="rlm-base-", dir="/var/tmp") as folder:
        script, rootfs = Path(folder, "bootstrap-base"), Path(folder, "rootfs.tar")
        script.write_bytes(recipe)
        code, lines = _run(["bash", str(script), str(rootfs)], deadline_s=_BOOTSTRAP_DEADLINE_S, say=say)
        if code != 0:
            raise ImageMissingError(
                f"the base image {PULLED_BASE} can be neither pulled nor made here: {lines}"
            )
        say("image: importing the base image")
        repository, version = base.split(":")
        with engine_errors("import the base image"):
            client.api.import_image_from_file(str(rootfs), repository=repository, tag=version)
            # The import's answer reads the same when it failed.
            client.images.get(base)


def _collect_wheels(client: docker.DockerClient, context: Path, wheelhouse: Path, say: Say) -> None:
    """Puts the pinned wheels for the engine's machine into the build context, hashes checked."""
    with engine_errors("ask for its architecture"):
        architecture = client.version()["Arch"]
    platform = _WHEEL_PLATFORMS.get(architecture)
    if platform is None:
        raise ImageMissingError(
            f"the sandbox image has no wheels for {architecture}, only for x86_64 and aarch64"
        )
    wheelhouse.mkdir(parents=True, exist_ok=True)
    # fmt: off
    download = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--require-hashes", "--no-deps", "--only-binary=:all:", "--python-version=3.11",
        "--implementation=cp", f"--platform={platform}", "--requirement", str(context / "requirements.txt"),
    ]
    # fmt: on
    from_wheelhouse = [*download, "--no-index", f"--find-links={wheelhouse}", f"--dest={context / 'wheels'}"]
    if _run(from_wheelhouse, deadline_s=_DOWNLOAD_DEADLINE_S)[0] == 0:
        return
    say(f"image: downloading wheels into {wheelhouse}")
    code, lines = _run([*download, f"--dest={wheelhouse}"], deadline_s=_DOWNLOAD_DEADLINE_S)
    if code == 0:
        code, lines = _run(from_wheelhouse, deadline_s=_DOWNLOAD_DEADLINE_S)
    if code != 0:
        raise ImageMissingError(
            f"wheels of the sandbox image are neither in {wheelhouse} nor can they be downloaded: {lines}"
        )


def _build_context(client: docker.DockerClient, context: Path, base: str, source: str, say: Say) -> None:
    last_lines: deque[str] = deque(maxlen=5)
    with engine_errors("build the sandbox image"):
        steps = client.api.build(
            path=str(context),
            tag=tag(source),
            buildargs={"BASE": base},
            labels={SOURCE_LABEL: source},
            network_mode="none",
            timeout=_BUILD_SILENCE_S,
            rm=True,
            forcerm=True,
            decode=True,
        )
        for step in steps:
            for line in str(step.get("stream", "")).splitlines():
                last_lines.append(line)
                if line.startswith("image: "):
                    say(line)
            if "error" in step:
                output = " / ".join(last_lines)
                raise EngineError(f"the build of the sandbox image failed: {step['error']} ({output})")


def tag_as_latest(client: docker.DockerClient, source: str) -> None:
    """For people; this program pins image ids."""
    with engine_errors("tag the sandbox image"):
        client.images.get(tag(source)).tag(REPOSITORY, "latest")


def _run(command: list[str], *, deadline_s: float, say: Say = lambda _: None) -> tuple[int, str]:
    """Runs a program, tells its output line by line, and returns its exit code and its last lines as one.

    It never outlives the call: past the deadline, or when this is interrupted, it is ended with its children.
    """
    last_lines: deque[str] = deque(maxlen=3)
    with subprocess.Popen(  # noqa: S603 - pip, or our own script
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        # SIGTERM, so that a script can remove what it made.
        deadline = threading.Timer(deadline_s, os.killpg, (process.pid, signal.SIGTERM))
        deadline.start()
        try:
            for line in process.stdout or ():
                last_lines.append(line.strip())
                say(line.rstrip())
            return process.wait(), " / ".join(last_lines)
        finally:
            deadline.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Every way in which an engine can fail is an `EngineError` that says what it could not do."""
    try:
        yield
    except (DockerException, RequestException) as error:
        raise EngineError(f"the engine could not {what}: {_first_line(error)}") from error


@contextmanager
def time_out(client: docker.DockerClient, silence_s: float) -> Iterator[None]:
    """Another time-out for the block, of the calls in which the client library respects it."""
    api: Any = client.api
    before = api.timeout
    api.timeout = silence_s
    try:
        yield
    finally:
        api.timeout = before


def _first_line(error: Exception) -> str:
    text = error.explanation if isinstance(error, APIError) and error.explanation else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
