"""Where the product's parts come from, and what is in the image: A15, N02, N04, N05."""

import ast
import io
import re
import shutil
import stat
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from docker import DockerClient
from packaging.requirements import Requirement
from packaging.version import Version

from orchestrator.config import Settings
from orchestrator.errors import EngineError, ImageMissingError, InvalidRequestError, SandboxStartError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import open_machine, open_workplace
from orchestrator.sandbox import image
from tests.fakes.engine import IMAGE, FakeEngine, serving
from tests.security.house import open_house
from tests.unit.sandbox import machines

PROJECT = Path(__file__).resolve().parents[2]

# --- A15: what is in the image ---------------------------------------------------------------------------

UNWANTED_PROGRAM = re.compile(
    r"apt|apt-.*|dpkg.*|pip[0-9.]*|easy_install.*|conda|gem|npm|"  # package managers
    r"cc|c\+\+|gcc.*|g\+\+.*|clang.*|ld|as|make|cpp|go|rustc|tcc|perl.*|"  # compilers, another language
    r"su|sudo|mount|umount|unshare|nsenter|chroot|setpriv|passwd|login|newgrp|"  # identities and namespaces
    r"ssh.*|scp|curl|wget|nc|ncat|netcat|telnet|ip|ifconfig|socat|gdb|strace|git"  # ways out, debuggers
)
UNWANTED_MODULE = {
    "pip",
    "setuptools",
    "ensurepip",
    "wheel",
    "venv",
    "distutils",
    "tkinter",
    "idlelib",
    "test",
}
SECRET = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519).*|authorized_keys|known_hosts|ssh_host_.*|.*\.key|\.git|\.gitconfig|\.netrc|"
    r"pip\.conf|\.pypirc|\.npmrc|\.docker|\.aws|\.bash_history|shadow-?|gshadow-?"
)
CACHE = re.compile(r"/(var/cache|var/lib/apt|root|home|usr/share/man|usr/share/info|usr/include|usr/src)/.")
EVERYBODYS = {"/tmp"}


def faults(root: tarfile.TarFile) -> list[str]:
    """What should not be in a root file system."""
    found = []
    for member in root:
        path = PurePosixPath("/", member.name)
        if str(path) == "/.dockerenv" or path.is_relative_to("/dev"):
            continue  # the engine's
        if member.mode & (stat.S_ISUID | stat.S_ISGID) and not member.issym():
            found.append(f"{path}: gives another identity")
        if member.mode & stat.S_IWOTH and not member.issym() and str(path) not in EVERYBODYS:
            found.append(f"{path}: anybody may write to it")
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            found.append(f"{path}: a device, a pipe or a socket")
        if path.parent.name in {"bin", "sbin"} and UNWANTED_PROGRAM.fullmatch(path.name):
            found.append(f"{path}: an unwanted program")
        if path.name in UNWANTED_MODULE and "python3" in str(path.parent):
            found.append(f"{path}: an unwanted module")
        if SECRET.fullmatch(path.name):
            found.append(f"{path}: a secret, or where one is kept")
        if CACHE.match(str(path)):
            found.append(f"{path}: left over from the build")
        if any(key in member.pax_headers for key in ("SCHILY.xattr.security.capability",)):
            found.append(f"{path}: has capabilities")
    return found


@pytest.fixture(scope="module")
def exported(engine: DockerClient, image_id: str) -> Iterator[tarfile.TarFile]:
    """The image's root file system, read by nobody but us: the container never starts."""
    container = engine.api.create_container(image_id, entrypoint=["nothing"], network_disabled=True)["Id"]
    try:
        with tempfile.TemporaryFile() as file:
            for piece in engine.api.export(container):
                file.write(piece)
            file.seek(0)
            with tarfile.open(fileobj=file) as root:
                yield root
    finally:
        engine.api.remove_container(container)


@pytest.mark.case("A15")
def test_the_image_holds_nothing_that_a_cell_has_no_use_for(exported: tarfile.TarFile) -> None:
    assert len(exported.getmembers()) > 1_000
    assert faults(exported) == []


@pytest.mark.case("A15")
@pytest.mark.control("A15")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("usr/bin/anything", 0o4755),
        ("usr/bin/anything", 0o2755),
        ("srv/drop", 0o777),
        ("usr/bin/apt-get", 0o755),
        ("usr/bin/dpkg", 0o755),
        ("usr/local/bin/pip3.11", 0o755),
        ("usr/bin/gcc-12", 0o755),
        ("usr/bin/perl5.36", 0o755),
        ("usr/bin/unshare", 0o755),
        ("usr/lib/python3.11/ensurepip", 0o755),
        ("root/.ssh/id_ed25519", 0o600),
        ("opt/rlm/.git", 0o755),
        ("etc/pip.conf", 0o644),
        ("var/cache/apt/pkgcache.bin", 0o644),
    ],
)
def test_the_same_look_finds_each_of_these_where_it_is(name: str, mode: int) -> None:
    spoilt = io.BytesIO()
    with tarfile.open(fileobj=spoilt, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.mode = mode
        tar.addfile(member)
    spoilt.seek(0)
    with tarfile.open(fileobj=spoilt) as root:
        assert faults(root)


@pytest.mark.case("A15")
def test_the_image_records_exactly_what_it_holds(engine: DockerClient, exported: tarfile.TarFile) -> None:
    status = exported.extractfile("var/lib/dpkg/status")
    contents = exported.extractfile("usr/share/rlm/contents.json")
    assert status is not None
    assert contents is not None
    named = set(re.findall(r"(?m)^Package: (.+)$", status.read().decode()))
    assert {"libc6", "bash", "coreutils", "libssl3"} <= named
    assert not named & {"apt", "perl-base", "passwd", "mount", "login"}
    listed = re.findall(r'"sha256": "([0-9a-f]{64})"', contents.read().decode())
    # Each wheel in the image is one that the sources name by its hash.
    assert listed
    assert set(listed) <= set(
        re.findall(r"sha256:([0-9a-f]{64})", (PROJECT / "sandbox_image/requirements.txt").read_text())
    )


# Taken out, or of other systems.
ABSENT_MODULES = {
    "_aix_support", "_gdbm", "_msi", "_overlapped", "_osx_support", "_scproxy", "_tkinter", "_winapi",
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "msilib", "msvcrt", "nis", "nt",
    "pydoc_data", "tkinter", "turtle", "turtledemo", "venv", "winreg", "winsound", "this",
    "_bootlocale", "ossaudiodev",
}  # fmt: skip

IMPORT_ALL = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
missing = []
for name in sorted(sys.stdlib_module_names - ABSENT):
    try: importlib.import_module(name)
    except Exception as error: missing.append(f"{name}: {error!r}")
print(missing)
"""

TOOLS = """
import ctypes, ctypes.util, sqlite3, ssl, subprocess, zoneinfo
def sh(text): return subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout.split()
print(sh("printf 'b 2\\\\na 1\\\\n' | sort | awk '{print $2}' | sed s/1/one/ | grep -n . | head -1"))
print(sh("which find tar gzip xargs diff cut tr wc"))
print(ctypes.util.find_library("c"), ctypes.CDLL(None).getpid() > 0)
print(zoneinfo.ZoneInfo("Europe/Berlin"))
"""


@pytest.mark.parametrize("runtime", ["runc"])
async def test_an_honest_cell_misses_nothing(settings: Settings, engine: DockerClient, runtime: str) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as inmate:
        assert await inmate.says(IMPORT_ALL.replace("ABSENT", repr(ABSENT_MODULES))) == "[]"
        printed = await inmate.says(TOOLS)
    assert "'1:one'" in printed
    assert all(
        f"/usr/bin/{name}" in printed for name in ("find", "tar", "gzip", "xargs", "diff", "cut", "tr", "wc")
    )
    assert "libc.so.6 True" in printed
    assert "Europe/Berlin" in printed


# --- N02: who talks to the engine ------------------------------------------------------------------------

# The driver and the image; what looks at an engine before it is used; what shows that it holds.
LAUNCHERS = (
    "orchestrator/sandbox/",
    "orchestrator/engine.py",
    "orchestrator/machine.py",
    "orchestrator/probes/",
)


@pytest.mark.case("N02")
def test_only_what_makes_sandboxes_knows_docker() -> None:
    importing = {
        str(path.relative_to(PROJECT))
        for path in (PROJECT / "orchestrator").rglob("*.py")
        if any(name.split(".")[0] in {"docker", "podman"} for name in imports(path))
    }
    assert "orchestrator/sandbox/docker_driver.py" in importing
    assert not [path for path in importing if not path.startswith(LAUNCHERS)]


@pytest.mark.case("N02", "D05")
def test_the_engines_socket_is_named_nowhere() -> None:
    """Whoever mounts or opens it would have to name it; the client library knows it, and nobody else need."""
    sources = [*(PROJECT / "orchestrator").rglob("*.py"), *(PROJECT / "sandbox_image").rglob("*")]
    texts = {path: path.read_text() for path in sources if path.is_file() and path.suffix != ".pyc"}
    assert not [path for path, text in texts.items() if "docker.sock" in text]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


# --- N04: dependencies ------------------------------------------------------------------------------------

# Below these, a hole is known that a guest, a model server or a bystander could reach.
FLOORS = {
    "protobuf": "6.33.5",  # CVE-2026-0994: nested messages exhaust the stack of the JSON parser
    "grpcio": "1.85.1",  # no hole that we know of: what a hostile guest can do was measured with this one
    "h11": "0.16",  # CVE-2025-43859: chunked bodies that two readers read as different requests
    "aiohttp": "3.12.14",  # CVE-2025-53643: likewise, in trailers
    "requests": "2.32.4",  # CVE-2024-47081: credentials of ~/.netrc for another host
    "urllib3": "2.6.3",  # CVE-2025-66418, CVE-2025-66471, CVE-2026-21441: answers that inflate without end
}


@pytest.mark.case("N04")
@pytest.mark.parametrize("name", FLOORS)
def test_what_is_installed_is_at_or_above_its_floor(name: str) -> None:
    assert Version(version(name)) >= Version(FLOORS[name])


@pytest.mark.case("N04")
def test_what_this_project_asks_for_cannot_be_below_a_floor() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    asked = {Requirement(line).name: Requirement(line) for line in project["dependencies"]}
    for name in FLOORS.keys() & asked.keys():
        floor = Version(FLOORS[name])
        assert not asked[name].specifier.contains(f"{floor.major}.{floor.minor - 1}.99"), asked[name]
    assert {"protobuf", "grpcio"} <= asked.keys()


@pytest.mark.case("N04")
def test_what_is_in_the_image_is_at_or_above_its_floor() -> None:
    text = image.sources()["requirements.txt"].decode()
    pinned = dict(re.findall(r"(?m)^([a-z-]+)==([0-9.]+)", text))
    assert {"protobuf", "grpcio"} <= pinned.keys()
    for name in FLOORS.keys() & pinned.keys():
        assert Version(pinned[name]) >= Version(FLOORS[name])


# --- N05: which image runs --------------------------------------------------------------------------------

OTHER = "sha256:" + "2" * 64


class Shelf(FakeEngine):
    """An engine with one image, or whose image goes away before the first container."""

    image_is_gone = False

    def answer(self, method: str, path: str, query: str, body: dict[str, Any]) -> tuple[int, object]:
        answered = super().answer(method, path, query, body)
        absent = path.startswith("/images/") and IMAGE not in path
        if absent or (self.image_is_gone and path == "/containers/create"):
            return 404, {"message": f"No such image: {path} {body.get('Image', '')}"}
        return answered


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Shelf, Path]]:
    # Not `tmp_path`: the path of a Unix socket below it may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rlm", dir="/tmp"))
    kept = Shelf(info=machines.info(), version={**machines.version(), "ApiVersion": "1.41"})
    with serving(kept, monkeypatch, directory):
        yield kept, directory
    shutil.rmtree(directory)


@asynccontextmanager
async def sandbox_of(reference: str, directory: Path) -> Any:
    """A sandbox made of that image."""
    settings = Settings(state_dir=directory / "state", image=reference)
    async with AsyncExitStack() as stack:
        workplace = await stack.enter_async_context(open_workplace(settings))
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime="runc"))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"nothing to see")
        yield await stack.enter_async_context(
            machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime="runc",
                guest_services=(),
                max_concurrent_calls=1,
            )
        )


@pytest.mark.case("N05")
@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("rlm-sandbox:latest", InvalidRequestError),
        ("rlm-sandbox", InvalidRequestError),
        # The first digits are enough for an engine, and for whoever can make an image that has them.
        ("sha256:1111", InvalidRequestError),
        ("elsewhere.example/sha256:latest", InvalidRequestError),
        (OTHER, ImageMissingError),
        (f"rlm-sandbox@{OTHER}", ImageMissingError),
    ],
)
async def test_no_other_image_than_a_pinned_and_present_one_is_run(
    shelf: tuple[Shelf, Path], reference: str, error: type[Exception]
) -> None:
    engine, directory = shelf
    with pytest.raises(error):
        async with sandbox_of(reference, directory):
            pytest.fail("a sandbox was made")
    assert not [request for request in engine.asked if not request.startswith("GET ")]


@pytest.mark.case("N05")
async def test_an_engine_that_answers_with_another_image_is_refused(shelf: tuple[Shelf, Path]) -> None:
    engine, directory = shelf
    engine.answer = lambda method, path, query, body: (  # type: ignore[method-assign]
        (200, {"Id": OTHER})
        if path.startswith("/images/")
        else Shelf.answer(engine, method, path, query, body)
    )
    with pytest.raises(EngineError, match="another image"):
        async with sandbox_of(IMAGE, directory):
            pytest.fail("a sandbox was made")


@pytest.mark.case("N05")
async def test_an_image_that_went_away_is_not_pulled(shelf: tuple[Shelf, Path]) -> None:
    engine, directory = shelf
    engine.image_is_gone = True
    with pytest.raises(SandboxStartError, match="No such image"):
        async with sandbox_of(IMAGE, directory):
            pytest.fail("a sandbox was made")
    assert "POST /containers/create" in engine.asked
    assert not [request for request in engine.asked if request.startswith("POST /images")]


@pytest.mark.case("N05")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_container_is_made_of_exactly_that_image(
    settings: Settings, engine: DockerClient, image_id: str, runtime: str
) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as inmate:
        assert inmate.container["Image"] == image_id
        assert inmate.container["Config"]["Image"] == image_id
