"""Settings of the process: environment to frozen dataclasses, read once by the composition root."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import InvalidRequestError
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.models.provider.environment import environment_for
from orchestrator.models.provider.sealed import VARIABLE
from orchestrator.sandbox.pool_rules import WhenEmpty
from orchestrator.sandbox.runtimes import EVERYBODY, RUNTIMES

DEFAULT_MODEL = "claude-sonnet-5-5"
"""Of a root run, unless something says otherwise ..."""
DEFAULT_SUB_MODEL = "claude-haiku-5-5"
"""... and of its sub-calls and child runs."""

_PREFIX = "RLM_"
_KNOWN = {
    "RLM_STATE_DIR",
    "RLM_IMAGE",
    "RLM_MAX_SANDBOXES",
    "RLM_POOL_RUNC",
    "RLM_POOL_RUNSC",
    "RLM_POOL_WHEN_EMPTY",
    "RLM_SANDBOX_MEMORY_MIB",
    "RLM_PRICES_FILE",
    "RLM_MODELS_ALLOWED",
    "RLM_PROVIDER",
    "RLM_RUNSC_TENANTS",
    "RLM_KNOWN_BAD_VERSIONS",
    "RLM_GRPC",
    "RLM_HTTP",
    "RLM_STORE",
    "RLM_BASE_URL",
    "RLM_MODEL",
    "RLM_SUB_MODEL",
    "RLM_MAX_RUNS",
    "RLM_MAX_MODEL_CALLS",
    "RLM_DRAIN_S",
    "RLM_AWAY_S",
    "RLM_RUNTIMES",
    "RLM_TLS_CERT_FILE",
    "RLM_TLS_KEY_FILE",
    "RLM_TLS_CLIENT_CA_FILE",
    "RLM_LOG",
    "RLM_METRICS",
    "RLM_ADMIN",
    "RLM_METRICS_BY_TENANT",
    "RLM_TRACES",
    # The key of a client of the service. No setting: `cli.environment` reads it for commands that need it.
    "RLM_API_KEY",
}
_DEBUG_SWITCHES = {
    "GRPC_TRACE": re.compile(r".+"),
    "GRPC_VERBOSITY": re.compile(r"(?i)debug|info"),
    "PYTHONASYNCIODEBUG": re.compile(r".+"),
    "PYTHONDEVMODE": re.compile(r".+"),
}
"""Variables of other programs that make our process write down what guests and models say."""
_TENANT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# These become part of an address.
_HOST_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSettings:
    """How every sandbox is built."""

    memory_mib: int = 512
    """Hard limit, RLM_SANDBOX_MEMORY_MIB. A cell that passes it is killed and its namespace is lost."""
    cpus: float = 1.0
    """Of one processor."""
    pids: int = 256
    """Processes and threads. With gVisor its own are counted too, and the limit is higher (`machine`)."""
    tmp_mib: int = 128
    """The guest's /tmp, in memory and counted against `memory_mib`."""
    shm_mib: int = 16
    """The guest's /dev/shm, private: `multiprocessing` needs some."""
    open_files: int = 1_024
    file_size_mib: int = 256
    """The largest file a cell can write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSettings:
    """Sandboxes made ahead (docs/pool.md). Each costs some 35 MB while it waits."""

    runc: int = 0
    """RLM_POOL_RUNC: how many wait with the runtime runc. They count among `max_sandboxes`."""
    runsc: int = 0
    """RLM_POOL_RUNSC: likewise with gVisor."""
    when_empty: WhenEmpty = WhenEmpty.COLD
    """RLM_POOL_WHEN_EMPTY: `cold`, `queue` or `refuse`; what a run gets when none waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """Of `rlm serve` alone. Its options say the same as the first four, and come before them."""

    grpc: str = "127.0.0.1:7443"
    """RLM_GRPC, HOST:PORT of the client port; port 0 for any that is free."""
    http: str = "127.0.0.1:7480"
    """RLM_HTTP, HOST:PORT of the same as HTTP; `off` for none."""
    store: str = ""
    """RLM_STORE, `sqlite:///FILE` or `postgresql://...`; empty for service.db in the state directory. A
    password belongs into PGPASSWORD or PGPASSFILE, and not into the URL."""
    base_url: str = ""
    """RLM_BASE_URL, a server that speaks the Anthropic Messages API; empty for the platform's own address."""
    model: str = DEFAULT_MODEL
    """RLM_MODEL, of root runs that don't ask for one."""
    sub_model: str = DEFAULT_SUB_MODEL
    """RLM_SUB_MODEL, of the sub-calls and child runs of those."""
    max_runs: int = 64
    """RLM_MAX_RUNS, root runs at once; mostly RLM_MAX_SANDBOXES binds before."""
    max_model_calls: int = 256
    """RLM_MAX_MODEL_CALLS, calls of models in flight at once, of all runs; the others wait, fairly between
    tenants. A run's own limit is its `max_concurrency`."""
    runtimes: Sequence[str] = ()
    """RLM_RUNTIMES, `runc`, `runsc` or both, separated by commas: what runs may ask for; the first is for
    those that don't. Empty for runc, and runsc too where RLM_RUNSC_TENANTS holds somebody to it."""
    drain_s: float = 30.0
    """RLM_DRAIN_S, what running runs have to end when the server is to end. Those that have not are resumed
    by the next one."""
    admin: bool = True
    """RLM_ADMIN, `on` or `off`: whether tenants and keys can be managed over the ports too (AdminService).
    For all but a tenant's own keys that needs an operator's key, which is made on this machine."""
    away_s: float = 60.0
    """RLM_AWAY_S: other servers of the same database settle what this one was doing when they have not heard
    of it for so long. Longer than it may stand still; a tenant's room is taken as long."""
    tls_cert_file: Path | None = None
    """RLM_TLS_CERT_FILE, PEM with its chain, for both ports ..."""
    tls_key_file: Path | None = None
    """RLM_TLS_KEY_FILE ... and its key."""
    tls_client_ca_file: Path | None = None
    """RLM_TLS_CLIENT_CA_FILE: who has no certificate of this authority is not let in, whatever key it has."""
    log_json: bool = False
    """RLM_LOG, `text` or `json`: how a line of the log looks, on stderr."""
    metrics: str = "off"
    """RLM_METRICS, HOST:PORT where Prometheus reads, without a key; port 0 for any that is free; `off` for
    none. Never the clients' port: one tenant's totals are none of another's business."""
    metrics_by_tenant: bool = False
    """RLM_METRICS_BY_TENANT, `yes` or `no`: whoever reads the metrics then learns tenants' ids."""
    traces: str = ""
    """RLM_TRACES, `http://HOST:PORT` or `https://`: a collector that takes OTLP over gRPC; empty for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All that the process is told by its environment, credentials apart: they have left it (`cli.start`)."""

    state_dir: Path
    """RLM_STATE_DIR: sockets and staged contexts, private to this user. Its path must be short: a Unix
    socket's path has at most 107 bytes."""
    image: str = ""
    """RLM_IMAGE: an image id or digest; empty for the image built from the present sources."""
    max_sandboxes: int = 16
    """RLM_MAX_SANDBOXES: containers at once. A run tree needs max_depth + 1 of them."""
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    pool: PoolSettings = field(default_factory=PoolSettings)
    platform: Platform | None = None
    """RLM_PROVIDER: where the models are served; None for Anthropic's own address or a server like it."""
    provider_environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What the provider process has of the environment. A proxy's address may hold a password."""
    prices_file: Path | None = None
    """RLM_PRICES_FILE: prices and sizes of models, and aliases, over those that we ship."""
    models_allowed: Sequence[str] = ()
    """RLM_MODELS_ALLOWED, separated by commas: no run uses another model. Empty for any."""
    runsc_tenants: frozenset[str] = frozenset()
    """RLM_RUNSC_TENANTS, ids separated by commas or `*` for everybody: their runs have gVisor or none. The
    tenant of the command line is `local`."""
    refuse_known_bad_versions: bool = False
    """RLM_KNOWN_BAD_VERSIONS, `warn` or `refuse`: what a known hole in engine, runtime, kernel or library
    does. A warning is the default, because a distribution's number often hides what it mended."""
    service: ServiceSettings = field(default_factory=ServiceSettings)
    debug_switches: Sequence[str] = ()
    """Names of variables that make libraries write down what guests and models say; `rlm doctor` and each
    run tell of them."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The process's settings.

    Raises:
        InvalidRequestError: A name starting with RLM_ is unknown (most likely misspelt), or a value makes no
            sense.
    """
    ours = {name for name in environment if name.startswith(_PREFIX)}
    unknown = sorted(ours - _KNOWN - {VARIABLE})
    if unknown:
        raise InvalidRequestError(
            f"unknown settings: {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN))}"
        )
    platform = _platform(environment)
    max_sandboxes = _positive(environment, "RLM_MAX_SANDBOXES", 16)
    return Settings(
        state_dir=Path(environment.get("RLM_STATE_DIR") or _default_state_dir(environment)),
        image=environment.get("RLM_IMAGE", ""),
        max_sandboxes=max_sandboxes,
        sandbox=SandboxSettings(memory_mib=_positive(environment, "RLM_SANDBOX_MEMORY_MIB", 512)),
        pool=_pool(environment, max_sandboxes),
        platform=platform,
        provider_environment=environment_for(platform, environment),
        prices_file=Path(environment["RLM_PRICES_FILE"]) if environment.get("RLM_PRICES_FILE") else None,
        models_allowed=_listed(environment.get("RLM_MODELS_ALLOWED", "")),
        runsc_tenants=_tenants(environment, "RLM_RUNSC_TENANTS"),
        refuse_known_bad_versions=_refuses(environment, "RLM_KNOWN_BAD_VERSIONS"),
        service=_service(environment),
        debug_switches=tuple(
            name for name, on in _DEBUG_SWITCHES.items() if on.fullmatch(environment.get(name, ""))
        ),
    )


def _service(environment: Mapping[str, str]) -> ServiceSettings:
    plain = ServiceSettings()
    settings = ServiceSettings(
        grpc=environment.get("RLM_GRPC") or plain.grpc,
        http=environment.get("RLM_HTTP") or plain.http,
        store=environment.get("RLM_STORE", ""),
        base_url=environment.get("RLM_BASE_URL", ""),
        model=environment.get("RLM_MODEL") or plain.model,
        sub_model=environment.get("RLM_SUB_MODEL") or environment.get("RLM_MODEL") or plain.sub_model,
        max_runs=_positive(environment, "RLM_MAX_RUNS", plain.max_runs),
        max_model_calls=_positive(environment, "RLM_MAX_MODEL_CALLS", plain.max_model_calls),
        runtimes=_runtimes(environment),
        drain_s=float(_whole(environment, "RLM_DRAIN_S", int(plain.drain_s))),
        away_s=float(_positive(environment, "RLM_AWAY_S", int(plain.away_s))),
        tls_cert_file=_path(environment, "RLM_TLS_CERT_FILE"),
        tls_key_file=_path(environment, "RLM_TLS_KEY_FILE"),
        tls_client_ca_file=_path(environment, "RLM_TLS_CLIENT_CA_FILE"),
        log_json=_one_of(environment, "RLM_LOG", "text", "json") == "json",
        metrics=environment.get("RLM_METRICS") or plain.metrics,
        admin=_one_of(environment, "RLM_ADMIN", "on", "off") == "on",
        metrics_by_tenant=_yes(environment, "RLM_METRICS_BY_TENANT"),
        traces=environment.get("RLM_TRACES", ""),
    )
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        raise InvalidRequestError("RLM_TLS_CERT_FILE and RLM_TLS_KEY_FILE go together")
    if settings.tls_client_ca_file is not None and settings.tls_cert_file is None:
        raise InvalidRequestError("RLM_TLS_CLIENT_CA_FILE needs RLM_TLS_CERT_FILE and RLM_TLS_KEY_FILE")
    if settings.traces and not settings.traces.startswith(("http://", "https://")):
        raise InvalidRequestError(f"RLM_TRACES must be an http or https address, not {settings.traces!r}")
    return settings


def _runtimes(environment: Mapping[str, str]) -> tuple[str, ...]:
    runtimes = _listed(environment.get("RLM_RUNTIMES", ""))
    odd = sorted(set(runtimes) - set(RUNTIMES))
    if odd:
        raise InvalidRequestError(f"RLM_RUNTIMES must list {' or '.join(RUNTIMES)}, not {odd[0]!r}")
    return runtimes


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    return Path(environment[name]) if environment.get(name) else None


def _yes(environment: Mapping[str, str], name: str) -> bool:
    return _one_of(environment, name, "no", "yes") == "yes"


def _one_of(environment: Mapping[str, str], name: str, default: str, other: str) -> str:
    text = environment.get(name) or default
    if text not in {default, other}:
        raise InvalidRequestError(f"{name} must be {default} or {other}, not {text!r}")
    return text


def _pool(environment: Mapping[str, str], max_sandboxes: int) -> PoolSettings:
    when_empty = environment.get("RLM_POOL_WHEN_EMPTY") or WhenEmpty.COLD.value
    if when_empty not in {one.value for one in WhenEmpty}:
        raise InvalidRequestError(f"RLM_POOL_WHEN_EMPTY must be cold, queue or refuse, not {when_empty!r}")
    pool = PoolSettings(
        runc=_whole(environment, "RLM_POOL_RUNC", 0),
        runsc=_whole(environment, "RLM_POOL_RUNSC", 0),
        when_empty=WhenEmpty(when_empty),
    )
    if pool.runc + pool.runsc > max_sandboxes:
        raise InvalidRequestError(
            f"RLM_POOL_RUNC and RLM_POOL_RUNSC are {pool.runc + pool.runsc} together, and RLM_MAX_SANDBOXES"
            f" allows {max_sandboxes} sandboxes"
        )
    return pool


def _platform(environment: Mapping[str, str]) -> Platform | None:
    """The platform, under the names that its own tools read, and without its credentials."""
    match environment.get("RLM_PROVIDER", ""):
        case "" | "anthropic":
            return None
        case "bedrock":
            region = "AWS_REGION" if environment.get("AWS_REGION") else "AWS_DEFAULT_REGION"
            return Bedrock(
                region=_host_part(environment, region),
                profile=environment.get("AWS_PROFILE", ""),
            )
        case "vertex":
            return Vertex(
                region=_host_part(environment, "CLOUD_ML_REGION"),
                project_id=_host_part(environment, "ANTHROPIC_VERTEX_PROJECT_ID"),
            )
        case "foundry":
            return Foundry(resource=_host_part(environment, "ANTHROPIC_FOUNDRY_RESOURCE"))
        case other:
            raise InvalidRequestError(
                f"RLM_PROVIDER must be anthropic, bedrock, vertex or foundry, not {other!r}"
            )


def _host_part(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not _HOST_PART.fullmatch(value):
        raise InvalidRequestError(
            f"RLM_PROVIDER={environment['RLM_PROVIDER']} needs {name},"
            f" a name of letters, digits and hyphens, not {value!r}"
        )
    return value


def _tenants(environment: Mapping[str, str], name: str) -> frozenset[str]:
    # A slip of the finger here would leave a tenant without its wall, so nothing is skipped.
    tenants = frozenset(_listed(environment.get(name, "")))
    odd = sorted(tenant for tenant in tenants if tenant != EVERYBODY and not _TENANT_ID.fullmatch(tenant))
    if odd:
        raise InvalidRequestError(f"{name} must list ids of tenants, or *, not {odd[0]!r}")
    return tenants


def _refuses(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "")
    if text not in {"", "warn", "refuse"}:
        raise InvalidRequestError(f"{name} must be warn or refuse, not {text!r}")
    return text == "refuse"


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


def _default_state_dir(environment: Mapping[str, str]) -> str:
    if os.geteuid() == 0:
        return "/var/lib/rlm"
    state_home = environment.get("XDG_STATE_HOME") or os.path.join(
        environment.get("HOME", "/"), ".local", "state"
    )
    return os.path.join(state_home, "rlm")


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    number = _whole(environment, name, default)
    if number == 0:
        raise InvalidRequestError(f"{name} must be a whole number above 0, not {environment[name]!r}")
    return number


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise InvalidRequestError(f"{name} must be a whole number, not {text!r}")
    return int(text)
