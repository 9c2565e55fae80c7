"""Who asks for a runtime gets it or nothing, and a sandbox that is not the one asked for is never used.

Real containers on the real engine; between us and the engine stands a proxy that changes what passes through,
as an engine would that lacks something or was set up wrongly.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.config import Settings
from orchestrator.errors import EngineError, InvalidRequestError
from orchestrator.machine import open_machine, open_workplace
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.runtime_probe import probe_runtime
from orchestrator.trajectory import Event, SandboxLeased
from tests.e2e.playing import Player
from tests.fakes.engine import JsonObject, ProxyEngine, serving

_ANSWER_KERNEL = "FINAL(open('/proc/version').read().strip())"
_HOST_KERNEL = Path("/proc/version").read_text(encoding="utf-8").strip()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlm", dir="/tmp") as made:
        yield Path(made)


@pytest.mark.case("A14")
async def test_a_runtime_is_offered_when_a_sandbox_on_it_works(settings: Settings, runtime: str) -> None:
    probe = await probe_runtime(settings, runtime, cells=3)
    assert probe.why_not == ""
    assert len(probe.cells_s) == 3
    assert probe.start_s > 0


@pytest.mark.case("A13")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_runtime_that_the_engine_does_not_have_is_refused(settings: Settings, runtime: str) -> None:
    missing = f"{runtime}-does-not-exist"
    async with open_workplace(settings) as workplace:
        with pytest.raises(EngineError, match=f"the engine has no runtime '{missing}'"):
            async with open_machine(settings, workplace, runtime=missing):
                pytest.fail("the machine was opened")


@pytest.mark.runsc
@pytest.mark.case("A14")
@pytest.mark.parametrize("runtime", ["runsc"], indirect=True)
async def test_a_tenant_that_is_held_to_gvisor_gets_gvisors_kernel(
    player: Player, settings: Settings, runtime: str
) -> None:
    options = RunOptions(
        question="Which kernel?",
        context_paths=(player.context(),),
        model=SCRIPTED_PREFIX + str(player.script([_ANSWER_KERNEL])),
    )
    events: list[Event] = []
    held = replace(settings, runsc_tenants=frozenset({"local"}))
    report = await app.run(options, held, observers=(events.append,))
    assert [event.payload.runtime for event in events if isinstance(event.payload, SandboxLeased)] == [
        runtime
    ]
    assert report.answer
    assert report.answer != _HOST_KERNEL


@pytest.mark.case("A14")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_tenant_that_is_held_to_gvisor_is_refused_runc(
    player: Player, settings: Settings, runtime: str
) -> None:
    player.settings = replace(settings, runsc_tenants=frozenset({"*"}))
    with pytest.raises(InvalidRequestError, match="holds the tenant 'local' to gVisor"):
        await player.cells(_ANSWER_KERNEL)


@pytest.mark.runsc
@pytest.mark.case("A14")
@pytest.mark.parametrize("runtime", ["runsc"], indirect=True)
async def test_an_engine_that_silently_takes_runc_for_gvisor_is_found_out(
    settings: Settings, runtime: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_runc(path: str, body: JsonObject) -> JsonObject:
        if path.endswith("/containers/create"):
            body["HostConfig"]["Runtime"] = "runc"
        return body

    def lie(path: str, answer: JsonObject) -> JsonObject:
        if path.endswith("/json") and "HostConfig" in answer:
            answer["HostConfig"]["Runtime"] = runtime
        return answer

    with serving(ProxyEngine(request=to_runc, response=lie), monkeypatch, directory):
        probe = await probe_runtime(settings, runtime)
    assert "behind its runtime 'runsc' runs " in probe.why_not


@pytest.mark.case("N09")
@pytest.mark.parametrize("runtime", ["runc"])
@pytest.mark.parametrize(
    ("setting", "drifted"),
    [("PidsLimit", 0), ("ReadonlyRootfs", False), ("SecurityOpt", ["no-new-privileges:true"])],
)
async def test_a_sandbox_that_the_engine_made_weaker_is_refused_and_removed(  # noqa: PLR0917 - fixtures
    settings: Settings,
    runtime: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    drifted: object,
) -> None:
    def weaker(path: str, body: JsonObject) -> JsonObject:
        if path.endswith("/containers/create"):
            body["HostConfig"][setting] = drifted
        return body

    with serving(ProxyEngine(request=weaker), monkeypatch, directory):
        probe = await probe_runtime(settings, runtime)
    assert f"another sandbox than it was asked for: {setting} is" in probe.why_not
