"""How a sandbox's container is made, where it takes more than one sandbox of the shipped image to see."""

import ast
import asyncio
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest
from docker import APIClient, DockerClient

import orchestrator
from orchestrator.config import Settings
from orchestrator.limits import RunLimits
from orchestrator.machine import resources
from orchestrator.sandbox.port import SandboxSpec
from tests.e2e.playing import Player
from tests.security.controls.weakened import host, weakened
from tests.security.house import open_house
from tests.security.posture.golden import GOLDEN, as_golden

KEY = "sk-canary-71aa"

_EMPTY: tuple[object, ...] = (None, "", 0, False, [], {}, -1)
_ENGINES_OWN: dict[str, Any] = {
    # What engines write down although nobody asked.
    "ConsoleSize": [0, 0],
}


@pytest.mark.case("A11")
async def test_the_engine_describes_the_golden_container_and_nothing_more(
    runtime: str, settings: Settings, engine: DockerClient
) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as sandbox:
        inspected = sandbox.container
    config, host_config = inspected["Config"], inspected["HostConfig"]
    mounts = {mount["Target"]: Path(mount["Source"]) for mount in host_config["Mounts"]}
    spec = SandboxSpec(
        sandbox_id=sandbox.leased.sandbox_id,
        socket_dir=mounts["/run/rlm"],
        context_dir=mounts["/context"],
        uid=int(config["User"].partition(":")[0]),
        runtime=runtime,
        expires_at_s=int(config["Labels"]["rlm.expires"]),
    )
    instance_id = config["Labels"]["rlm.instance"]
    described = {name: config.get(name) for name in GOLDEN} | {"HostConfig": host_config}
    seen = as_golden(described, spec, image=settings.image, instance_id=instance_id)

    # The image adds to the environment and to the labels; nothing else is the image's to say.
    assert set(GOLDEN["Env"]) <= set(seen.pop("Env"))
    assert GOLDEN["Labels"].items() <= seen.pop("Labels").items()
    wanted = {name: value for name, value in GOLDEN.items() if name not in {"Env", "Labels"}}
    # gVisor's own threads are counted, too.
    assert seen["HostConfig"]["PidsLimit"] == resources(settings.sandbox, runtime).pids
    seen["HostConfig"]["PidsLimit"] = wanted["HostConfig"]["PidsLimit"]
    extra = {
        name: seen["HostConfig"].pop(name) for name in seen["HostConfig"].keys() - wanted["HostConfig"].keys()
    }
    assert {name: _plain(value) for name, value in seen.items()} == {
        name: _plain(value) for name, value in wanted.items()
    }
    assert {
        name: value
        for name, value in extra.items()
        if value not in _EMPTY and _ENGINES_OWN.get(name) != value
    } == {}
    assert not inspected["HostConfig"].get("Binds")
    assert set(mounts) == {"/run/rlm", "/context"}


def _plain(value: Any) -> Any:
    """Without what an engine leaves out or fills in: values that mean nothing, and the order of limits."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each not in _EMPTY}
    if isinstance(value, list):
        plain = [_plain(each) for each in value]
        return sorted(plain, key=str) if all(isinstance(each, dict) for each in plain) else plain
    return value


# --- Privileges ----------------------------------------------------------------------------------------

AS_WHOM = """
import os, subprocess
print(os.stat("/opt/as-root").st_mode & 0o4000 != 0,
      subprocess.run(["/opt/as-root", "-u"], capture_output=True, text=True).stdout.strip())
"""


@pytest.fixture(scope="module")
def image_with_setuid(engine: DockerClient, image_id: str) -> Iterator[str]:
    """The sandbox image with a setuid-root copy of `id` in it, which ours must not have."""
    recipe = (
        f"FROM {image_id}\nUSER 0:0\nRUN cp /usr/bin/id /opt/as-root && chmod 4755 /opt/as-root\n"
        "USER 65532:65532\n"
    )
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(recipe)
        tar.addfile(entry, io.BytesIO(recipe.encode()))
    archive.seek(0)
    image, _ = engine.images.build(fileobj=archive, custom_context=True, network_mode="none", rm=True)
    yield str(image.id)
    engine.images.remove(str(image.id), force=True)


@pytest.mark.case("A02")
async def test_a_setuid_program_runs_as_the_cell_that_started_it(
    runtime: str, settings: Settings, engine: DockerClient, image_with_setuid: str
) -> None:
    special = replace(settings, image=image_with_setuid)
    async with open_house(special, engine, runtime) as house, house.sandbox() as sandbox:
        has_bit, uid = (await sandbox.says(AS_WHOM)).split()
        own = await sandbox.says("import os; print(os.getuid())")
    assert has_bit == "True"
    assert uid == own != "0"


@pytest.mark.case("N10")
@pytest.mark.control("A02")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_without_the_flag_it_would_run_as_root(
    runtime: str, settings: Settings, engine: DockerClient, image_with_setuid: str
) -> None:
    special = replace(settings, image=image_with_setuid)
    with weakened(host(SecurityOpt=["seccomp=unconfined"])):
        async with open_house(special, engine, runtime) as house, house.sandbox() as sandbox:
            assert await sandbox.says(AS_WHOM) == "True 0"


# --- Environment ---------------------------------------------------------------------------------------

PROXY = "http://someone:secret-4c1d@proxy.invalid:3128"
ENVIRONMENT = 'import os; print(dict(os.environ), open("/proc/1/environ").read())'


@pytest.fixture
def user_with_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose Docker configuration has proxies, and whose shell has a key."""
    (tmp_path / "config.json").write_text(
        json.dumps({"proxies": {"default": {"httpProxy": PROXY, "httpsProxy": PROXY}}})
    )
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    return tmp_path


@pytest.mark.case("A08")
@pytest.mark.usefixtures("user_with_proxies")
async def test_no_proxy_and_no_key_of_the_user_is_in_a_sandbox(
    runtime: str, settings: Settings, engine: DockerClient
) -> None:
    async with open_house(settings, engine, runtime) as house, house.sandbox() as sandbox:
        seen = await sandbox.says(ENVIRONMENT) + str(sandbox.container)
    assert "PYTHONHASHSEED" in seen
    for secret in (PROXY, "secret-4c1d", "proxy", KEY):
        assert secret not in seen.lower()


@pytest.mark.case("N10")
@pytest.mark.control("A08")
@pytest.mark.parametrize("runtime", ["runc"])
@pytest.mark.usefixtures("user_with_proxies")
async def test_the_clients_own_way_to_make_a_container_would_hand_the_proxy_in(
    runtime: str, engine: DockerClient, image_id: str
) -> None:
    client: DockerClient = await asyncio.to_thread(docker.from_env)
    try:
        made = await asyncio.to_thread(client.containers.create, image_id, runtime=runtime)
        try:
            assert any(PROXY in entry for entry in made.attrs["Config"]["Env"])
        finally:
            await asyncio.to_thread(made.remove, force=True)
    finally:
        client.close()


# --- Never into a running sandbox ----------------------------------------------------------------------

PACKAGE = Path(orchestrator.__file__).parent
QUICK = RunLimits(cell_timeout_s=2.0)
INTO_A_CONTAINER = (
    "attach", "attach_socket", "commit", "diff", "exec_create", "exec_start", "exec_resize", "export",
    "get_archive", "logs", "pause", "put_archive", "restart", "top", "update_container",
)  # fmt: skip
WORDS_OF_OTHERS = {"top", "export", "commit", "logs", "pause", "diff"}
"""Also attributes of what is no client; the run above would have met them."""


@pytest.mark.case("B08", "F07")
async def test_a_whole_run_never_reaches_into_a_container(
    player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_named: object) -> None:
        raise AssertionError("this reaches into a running container")

    for name in INTO_A_CONTAINER:
        assert hasattr(APIClient, name), "the client still has it under this name"
        monkeypatch.setattr(APIClient, name, refuse)
    played = await player.cells("import os; os._exit(3)", "while True: pass", "FINAL('done')", limits=QUICK)
    assert played.report.answer == "done"


@pytest.mark.case("B08", "F07")
def test_nothing_in_the_package_calls_what_reaches_into_a_container() -> None:
    """Before the start either: nothing but create, start, inspect, measure, list and remove is needed."""
    called = [
        f"{path.name}:{node.lineno} {node.attr}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in set(INTO_A_CONTAINER) - WORDS_OF_OTHERS
    ]
    assert called == []
