"""The container engine of this machine, looked at before a sandbox is made on it.

What speaks against it is decided in `sandbox.preflight`; here is the asking. Everything blocks.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from docker import DockerClient
from docker.errors import APIError, DockerException
from docker.utils import kwargs_from_env
from requests.exceptions import RequestException

from orchestrator.config import Settings
from orchestrator.errors import EngineError
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.engine_facts import EngineFacts, read_facts
from orchestrator.sandbox.host_facts import read_host_facts, with_mended
from orchestrator.sandbox.known_bad import table
from orchestrator.sandbox.preflight import (
    Objection,
    address_objection,
    objections,
    runtime_objection,
    sentence,
)
from orchestrator.sandbox.runtimes import GVISOR

_ON_THIS_HOST = "http+docker://localhost"
"""What docker-py calls an engine behind a Unix socket. Only then do the host's files say something of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LookedAt:
    """An engine and what was found out about it."""

    client: DockerClient
    facts: EngineFacts
    objections: Sequence[Objection]
    """What refuses comes first."""


def fit_engine(settings: Settings, *, runtime: str) -> LookedAt:
    """The engine, fit for sandboxes on this runtime. What it lacks it may lack with a warning.

    Raises:
        EngineError: None answers, or something speaks against sandboxes on it: all of that, by name.
    """
    engine = look_at_engine(settings, runtime=runtime)
    missing = runtime_objection(runtime, engine.facts)
    refusing = [one for one in (missing, *engine.objections) if one is not None and one.refuses]
    if refusing:
        engine.client.close()
        raise EngineError(f"no sandbox is started on this machine: {sentence(refusing)}")
    return engine


def look_at_engine(settings: Settings, *, runtime: str | None = None) -> LookedAt:
    """The engine and everything that speaks against it, for one runtime or for all.

    Raises:
        EngineError: None answers, or not at an address that may be asked.
    """
    client = connect()
    try:
        facts = _facts(client)
        local = client.api.base_url == _ON_THIS_HOST
        # Asking gVisor costs 50 ms and more: a run pays that only where the answer could refuse it.
        judged = runtime is None or (runtime == GVISOR and settings.refuse_known_bad_versions)
        gvisor = facts.runtimes.get(GVISOR, ()) if judged else ()
        host = read_host_facts(gvisor) if local else None
        holes = table()
        if host is not None:
            facts = replace(facts, components=[with_mended(one, holes) for one in facts.components])
            host = replace(host, components=[with_mended(one, holes) for one in host.components])
    except BaseException:
        client.close()
        raise
    found = objections(
        facts, host, holes=holes, refuse_known_bad=settings.refuse_known_bad_versions, runtime=runtime
    )
    return LookedAt(client=client, facts=facts, objections=found)


def connect() -> DockerClient:
    """A client of the engine, for what needs no sandbox.

    Raises:
        EngineError: None answers, or not at an address that may be asked.
    """
    _check_address()
    return connect_engine()


def _check_address() -> None:
    try:
        named = kwargs_from_env()
    except DockerException as error:
        raise EngineError("the certificates that DOCKER_CERT_PATH names cannot be used") from error
    verified = bool(getattr(named.get("tls"), "verify", False))
    objection = address_objection(str(named.get("base_url", "")), verified_tls=verified)
    if objection is not None:
        raise EngineError(sentence([objection]))


def _facts(client: DockerClient) -> EngineFacts:
    # Side by side: the engine asks runc and its init for their versions, 10 ms each, in both calls.
    with ThreadPoolExecutor(2, thread_name_prefix="look") as threads:
        info, version = threads.submit(client.info), threads.submit(client.version)
        try:
            return read_facts(info.result(), version.result())
        except (APIError, RequestException, ValueError) as error:
            raise EngineError("the container engine does not describe itself as an engine does") from error
