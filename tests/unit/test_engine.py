"""Start-up against engines that lack something, each a real HTTP server on a real Unix socket."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli.main import app as rlm
from orchestrator.config import Settings
from orchestrator.engine import fit_engine, look_at_engine
from orchestrator.errors import EngineError
from orchestrator.runtime_probe import probe_runtime
from tests.fakes.engine import IMAGE, FakeEngine, JsonObject, serving
from tests.unit.sandbox import machines

Serve = Callable[[FakeEngine], FakeEngine]


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not `tmp_path`: the path of a Unix socket below it may have 107 bytes.
    made = Path(tempfile.mkdtemp(prefix="rlm", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def settings(directory: Path) -> Settings:
    return Settings(state_dir=directory / "state", image=IMAGE)


@pytest.fixture
def serve(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    for name in ("DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:

        def started(engine: FakeEngine) -> FakeEngine:
            stack.enter_context(serving(engine, monkeypatch, directory))
            return engine

        yield started


def engine(info: Mapping[str, Any] | None = None, **more: Any) -> FakeEngine:
    version = {**machines.version(), "ApiVersion": "1.41"}
    return FakeEngine(info={**machines.info(), **(info or {})}, version=version, **more)


def test_a_healthy_engine_is_fit_and_asked_but_four_things(serve: Serve, settings: Settings) -> None:
    healthy = serve(engine())
    looked = fit_engine(settings, runtime="runc")
    looked.client.close()
    assert not [objection for objection in looked.objections if objection.refuses]
    assert sorted(healthy.asked) == ["GET /_ping", "GET /info", "GET /version", "GET /version"]


@pytest.mark.case("A13")
@pytest.mark.parametrize(
    ("lacking", "name"),
    [
        ({"SecurityOptions": []}, "seccomp"),
        ({"PidsLimit": False}, "pids limit"),
        ({"MemoryLimit": False}, "memory limit"),
        ({"SwapLimit": False}, "swap limit"),
        ({"CpuCfsQuota": False}, "cpu quota"),
        ({"Runtimes": {"runsc": {"path": "runsc"}}}, "runtime runc"),
    ],
)
def test_rlm_run_starts_nothing_on_an_engine_that_lacks_a_part_of_the_wall(
    serve: Serve,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: Mapping[str, Any],
    name: str,
) -> None:
    lacks = serve(engine(lacking))
    script, context = directory / "script.py", directory / "context.txt"
    script.write_text("def run(question, depth):\n    yield 'print(1)'\n    return 'done'\n")
    context.write_text("text")
    monkeypatch.setenv("RLM_STATE_DIR", str(directory / "state"))
    monkeypatch.setenv("RLM_IMAGE", IMAGE)
    command = ["run", "why?", "--context", str(context), "--model", f"scripted:{script}"]
    result = CliRunner().invoke(rlm, command)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert f"no sandbox is started on this machine: {name}: " in str(result.stderr) + str(result.exception)
    assert not [request for request in lacks.asked if not request.startswith("GET")]


@pytest.mark.case("A13", "A14")
def test_a_runtime_that_is_asked_for_and_missing_is_refused_and_no_other_is_used(
    serve: Serve, settings: Settings
) -> None:
    serve(engine({"Runtimes": {"runc": {"path": "runc"}}}))
    with pytest.raises(EngineError, match=r"the engine has no runtime 'runsc'; it has runc \(register it"):
        fit_engine(settings, runtime="runsc")


@pytest.mark.case("A13")
def test_everything_that_refuses_is_named_at_once(serve: Serve, settings: Settings) -> None:
    serve(engine({"PidsLimit": False, "SecurityOptions": None, "Runtimes": None}))
    with pytest.raises(EngineError, match=r"runtime runc: .*; seccomp: .*; pids limit: "):
        fit_engine(settings, runtime="runc")


@pytest.mark.case("A16")
def test_a_known_hole_warns_or_refuses_as_the_settings_say(serve: Serve, settings: Settings) -> None:
    old = engine()
    old.version["Components"][2]["Version"] = "1.1.11"
    serve(old)
    looked = fit_engine(settings, runtime="runc")
    looked.client.close()
    assert "runc version" in [objection.name for objection in looked.objections]
    with pytest.raises(EngineError, match=r"runc version: runc 1\.1\.11 has known holes \(CVE-2024-21626"):
        fit_engine(replace(settings, refuse_known_bad_versions=True), runtime="runc")


@pytest.mark.case("A13")
@pytest.mark.parametrize(
    "odd", [{"Runtimes": "\x1b[2J"}, {"OSType": "\x1b]0;x\x07"}, {"Runtimes": {"\x1b": 1}}]
)
def test_words_of_an_engine_reach_no_terminal_raw(serve: Serve, settings: Settings, odd: JsonObject) -> None:
    serve(engine(odd))
    with pytest.raises(EngineError) as refused:
        fit_engine(settings, runtime="crun")
    assert str(refused.value).isprintable()


@pytest.mark.case("N02", "N03")
def test_an_engine_in_the_clear_is_not_even_asked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(EngineError, match=r"engine address: 'tcp://127\.0\.0\.1:1'"):
        look_at_engine(settings)


@pytest.mark.case("N02")
def test_certificates_that_are_not_there_are_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    with pytest.raises(EngineError, match="certificates that DOCKER_CERT_PATH names"):
        look_at_engine(settings)


@pytest.mark.case("A16")
def test_an_old_gvisor_refuses_where_the_settings_say_so(
    serve: Serve, settings: Settings, tmp_path: Path
) -> None:
    program = tmp_path / "runsc"
    program.write_text("#!/bin/sh\necho runsc version release-20221219.0\n")
    program.chmod(0o755)
    serve(engine({"Runtimes": {"runsc": {"path": str(program)}}}))
    looked = look_at_engine(settings)
    looked.client.close()
    assert "runsc version" in [objection.name for objection in looked.objections]
    with pytest.raises(EngineError, match=r"runsc version: runsc release-20221219\.0 is out of date"):
        fit_engine(replace(settings, refuse_known_bad_versions=True), runtime="runsc")


# --- A sandbox that is not the one that was asked for --------------------------------------------------


@pytest.mark.case("A13", "N09")
async def test_a_limit_that_is_dropped_with_a_warning_is_a_refusal(serve: Serve, settings: Settings) -> None:
    lax = serve(engine(warnings=["Your kernel does not support swap limit capabilities. Memory limited."]))
    probe = await probe_runtime(settings, "runc")
    assert "it warns 'Your kernel does not support swap limit" in probe.why_not
    assert "POST /containers/create" in lax.asked
    assert lax.left() == []


@pytest.mark.case("N09")
async def test_a_sandbox_that_drifted_is_refused_and_removed(serve: Serve, settings: Settings) -> None:
    def drifted(answer: JsonObject) -> JsonObject:
        answer["HostConfig"]["NetworkMode"] = "bridge"
        return answer

    lax = serve(engine(inspected=drifted))
    probe = await probe_runtime(settings, "runc")
    assert "NetworkMode is 'bridge', not 'none'" in probe.why_not
    assert lax.left() == []


@pytest.mark.case("A14")
async def test_a_runtime_that_only_has_gvisors_name_is_not_offered(serve: Serve, settings: Settings) -> None:
    lax = serve(engine())
    probe = await probe_runtime(settings, "runsc")
    assert not probe.works
    assert "behind its runtime 'runsc' runs" in probe.why_not
    assert lax.left() == []


@pytest.mark.case("A13")
async def test_a_runtime_whose_containers_never_run_is_given_up_and_cleared_away(
    serve: Serve, settings: Settings
) -> None:
    silent = serve(engine())
    probe = await probe_runtime(settings, "runc", deadline_s=0.5)
    assert probe.why_not == "no cell was answered within 0.5 s"
    assert "POST /containers/create" in silent.asked
    assert silent.left() == []
