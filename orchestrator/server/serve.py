"""The server as a whole: it opens every part, says that it is ready, and ends in an order that loses nothing.

Opening: state directory, database, machine, provider, then the service, which takes up what the server before
left, then the ports. A provider that does not answer is no reason not to open: the runs wait for it. Ending
is the other way round, after a drain: from its first moment no new run is taken and health says so; runs have
their grace; watches end; the ports close.
"""

import asyncio
import fcntl
import gc
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.access import open_access
from orchestrator.config import ServiceSettings, Settings
from orchestrator.errors import InvalidRequestError, MachineError
from orchestrator.ids import RunId
from orchestrator.machine import Machine, open_machine, open_workplace
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.sandbox.runtimes import EVERYBODY, GVISOR, RUNC
from orchestrator.server.admin_shell import admin_service
from orchestrator.server.grpc_shell import Port, Tls, open_port
from orchestrator.server.http.app import make_app
from orchestrator.server.http.listening import Certificates, listening
from orchestrator.server.metrics import ServiceMetrics
from orchestrator.server.metrics_port import metrics_port
from orchestrator.server.readiness import (
    DATABASE,
    DISK,
    DRAINING,
    ENGINE,
    PROVIDER,
    Readiness,
    looking,
    room_in,
)
from orchestrator.server.traces import open_traces, provider_name
from orchestrator.service import windows
from orchestrator.service.admin import AdminOffice
from orchestrator.service.admin_port import Admin
from orchestrator.service.books import Books
from orchestrator.service.hooks import ServiceHook
from orchestrator.service.office import OfficeParts, ServiceOffice, open_office
from orchestrator.service.rules import Offer
from orchestrator.store.books import Quota, TenantRow
from orchestrator.store.database import Database, open_database
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_contexts import SqlContextBook
from orchestrator.store.sql_events import SqlTreeBook
from orchestrator.store.sql_homes import SqlHomeBook
from orchestrator.store.sql_operators import SqlOperatorBook
from orchestrator.store.sql_rooms import SqlRoomBook
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.store.sql_usage import SqlUsageBook
from orchestrator.tenants.sql import SqlTenantAccount

OFF = "off"
"""Instead of an address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server that is ready."""

    office: ServiceOffice
    grpc: str
    """Where it listens, HOST:PORT ..."""
    http: str
    """... and for HTTP; empty when it is off ..."""
    metrics: str
    """... and for Prometheus; likewise."""


async def serve(
    settings: Settings,
    provider: ProviderProcess | None,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[Served], None],
    say: Callable[[str], None],
) -> None:
    """Serve until `stop` is set, and for as long as draining takes then.

    Args:
        settings: The process's settings.
        provider: Has the provider's credentials; None where only scripted models are served.
        stop: Ends it in an orderly way. Cancelling it does so without any grace.
        on_ready: Called once clients may come.
        say: Told what whoever starts a server should know, a line each.

    Raises:
        CallerError: A setting makes no sense.
        MachineError: The machine lacks something.
    """
    async with _serving(settings, provider, stop=stop, say=say) as (served, drain, readiness):
        leave_to_stay()
        on_ready(served)
        await stop.wait()
        await drain()
        if readiness.broken:
            raise MachineError(readiness.broken)


@asynccontextmanager
async def _serving(
    settings: Settings, provider: ProviderProcess | None, *, stop: asyncio.Event, say: Callable[[str], None]
) -> AsyncIterator[tuple[Served, Callable[[], Awaitable[None]], Readiness]]:
    """A server for the length of the block, and what drains it."""
    async with AsyncExitStack() as stack:
        workplace = await stack.enter_async_context(open_workplace(settings))
        service_dir = settings.state_dir / "service"
        home = stack.enter_context(_own(service_dir))
        url = settings.service.store or f"sqlite:///{settings.state_dir.absolute() / 'service.db'}"
        database = await stack.enter_async_context(open_database(url))
        runtime, *others = _runtimes(settings)
        machine = await stack.enter_async_context(
            open_machine(settings, workplace, runtime=runtime, also=others)
        )
        for warning in _warnings(settings, machine):
            say(warning)
        models = await stack.enter_async_context(open_access(settings, provider))
        hooks: list[ServiceHook] = []
        books = books_of(database)
        office: ServiceOffice | None = None

        def gauges() -> Mapping[str, float]:
            return {} if office is None else _gauges(office)

        metrics = ServiceMetrics(gauges, by_tenant=settings.service.metrics_by_tenant)
        metrics.watch_pool(machine.pool)
        hooks.append(metrics)
        if settings.service.traces:
            traces = open_traces(settings.service.traces, provider=provider_name(settings.platform))
            hooks.append(await stack.enter_async_context(traces))
        office = await stack.enter_async_context(
            open_office(
                OfficeParts(
                    books=books,
                    machine=machine,
                    models=models,
                    offer=Offer(
                        model=settings.service.model,
                        sub_model=settings.service.sub_model,
                        models_allowed=settings.models_allowed,
                        runtimes=(runtime, *others),
                        max_sandboxes=settings.max_sandboxes,
                        held_to_gvisor=settings.runsc_tenants,
                    ),
                    open_account=accounts_of(books),
                    contexts_dir=service_dir / "contexts",
                    home=home,
                    max_running=settings.service.max_runs,
                    max_model_calls=settings.service.max_model_calls,
                    drain_grace_s=settings.service.drain_s,
                    lease_s=settings.service.away_s,
                    hooks=hooks,
                    is_held=True,
                )
            )
        )
        admin = admin_of(books, database, office) if settings.service.admin else None
        port = await stack.enter_async_context(
            open_port(
                office,
                settings.service.grpc,
                tls=_tls(settings.service),
                is_ready=False,
                also=() if admin is None else (admin_service(admin),),
            )
        )
        readiness = Readiness(
            {
                DATABASE: database.ping,
                ENGINE: machine.look,
                PROVIDER: models.look_at_provider,
                DISK: room_in(settings.state_dir),
            },
            provider,
        )

        def not_ready() -> Sequence[str]:
            return readiness.told if office.is_ready else (DRAINING, *readiness.told)

        async def say_ready(is_ready: bool) -> None:
            await port.say_ready(is_ready)
            office.hold(not is_ready, but_one=models.one_may_try and readiness.told == (PROVIDER,))

        http = await stack.enter_async_context(_http(settings.service, office, admin, not_ready))
        read_at = await stack.enter_async_context(_metrics(settings.service, metrics))
        await stack.enter_async_context(looking(readiness, say_ready=say_ready, on_broken=stop.set))
        served = Served(office=office, grpc=port.address, http=http, metrics=read_at)
        yield served, lambda: _drain(office, port, machine, settings.service.drain_s), readiness


def leave_to_stay() -> None:
    """What is there now stays for good: the collector need not look at it again.

    Otherwise it goes through the 140,000 objects of our libraries whenever runs have made a quarter as many,
    and every run waits for it: 0.1 to 0.4 s.
    """
    gc.collect()
    gc.freeze()


def books_of(database: Database) -> Books:
    """The books in one database."""
    return Books(
        tenants=SqlTenantBook(database),
        runs=SqlRunBook(database),
        contexts=SqlContextBook(database),
        usage=SqlUsageBook(database),
        trees=SqlTreeBook(database),
        audit=SqlAuditBook(database),
        homes=SqlHomeBook(database),
        rooms=SqlRoomBook(database),
    )


def admin_of(books: Books, database: Database, office: ServiceOffice) -> AdminOffice:
    """The administration of what is in a database, on a server of it."""
    return AdminOffice(books.tenants, SqlOperatorBook(database), on_removed=office.tenant_removed)


def accounts_of(books: Books) -> Callable[[TenantRow, RunId], SqlTenantAccount]:
    """Who pays for a tenant's run trees: its quotas as they are whenever something is drawn."""

    def open_account(tenant: TenantRow, tree: RunId) -> SqlTenantAccount:
        async def windows_now() -> Mapping[str, Quota]:
            now = await books.tenants.tenant(tenant.tenant_id)
            return windows.windows((now or tenant).rules, time.time())

        return SqlTenantAccount(books.usage, tenant.tenant_id, tree=tree, windows=windows_now)

    return open_account


def _runtimes(settings: Settings) -> Sequence[str]:
    """What the server offers, the one for those who don't ask first."""
    if settings.service.runtimes:
        return settings.service.runtimes
    if EVERYBODY in settings.runsc_tenants:
        return (GVISOR,)
    return (RUNC, GVISOR) if settings.runsc_tenants else (RUNC,)


async def _drain(office: ServiceOffice, port: Port, machine: Machine, grace_s: float) -> None:
    await port.shut()
    # Not at its end: it may be the engine that what runs waits for.
    asyncio.get_running_loop().call_later(grace_s, machine.hurry)
    await office.drain()
    machine.hurry()


@contextmanager
def _own(directory: Path) -> Iterator[str]:
    """The service's part of the state directory, for this process alone; the id of the state directory.

    Raises:
        MachineError: Another server has it, or it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise MachineError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(
                f"another server runs on the state directory {directory.parent}; give this one its own"
            ) from error
        yield _home_id(directory)
    finally:
        os.close(lock)


def _home_id(directory: Path) -> str:
    """The id of this state directory, made up at its first use: contexts and runs belong to it.

    Raises:
        MachineError: It is gone, and contexts are not: to start anew would be to remove them.
    """
    file, contexts = directory / "home", directory / "contexts"
    try:
        if file.exists():
            return file.read_text().strip()
        if contexts.is_dir() and any(contexts.iterdir()):
            raise MachineError(f"{file} is gone, and {contexts} is not: restore it, or remove both")
        home = secrets.token_hex(8)
        with open(file, "x") as made:
            made.write(home + "\n")
            made.flush()
            os.fsync(made.fileno())
        return home
    except OSError as error:
        raise MachineError(f"{file} cannot be used: {error.strerror}") from error


@asynccontextmanager
async def _http(
    settings: ServiceSettings,
    office: ServiceOffice,
    admin: Admin | None,
    not_ready: Callable[[], Sequence[str]],
) -> AsyncIterator[str]:
    if settings.http == OFF:
        yield ""
        return
    host, port = _host_port(settings.http, "RLM_HTTP")
    app = make_app(office, lambda: not not_ready(), why_not=not_ready, admin=admin)
    async with listening(app, host=host, port=port, certificates=_certificates(settings)) as (_, bound):
        yield f"{settings.http.rpartition(':')[0]}:{bound}"


@asynccontextmanager
async def _metrics(settings: ServiceSettings, metrics: ServiceMetrics) -> AsyncIterator[str]:
    if settings.metrics == OFF:
        yield ""
        return
    host, port = _host_port(settings.metrics, "RLM_METRICS")
    certificates = _certificates(settings)
    async with metrics_port(metrics.exposition, host=host, port=port, certificates=certificates) as bound:
        yield f"{settings.metrics.rpartition(':')[0]}:{bound}"


def _certificates(settings: ServiceSettings) -> Certificates | None:
    if settings.tls_cert_file is None:
        return None
    return Certificates(
        certificate=str(settings.tls_cert_file),
        key=str(settings.tls_key_file),
        client_authority=str(settings.tls_client_ca_file) if settings.tls_client_ca_file else None,
    )


def _tls(settings: ServiceSettings) -> Tls | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    return Tls(
        certificate_file=settings.tls_cert_file,
        key_file=settings.tls_key_file,
        client_ca_file=settings.tls_client_ca_file,
    )


def _host_port(address: str, name: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequestError(f"{name} must be HOST:PORT, not {address!r}")
    return host.strip("[]"), int(port)


def _gauges(office: ServiceOffice) -> Mapping[str, float]:
    return {
        "runs_running": office.running,
        "runs_queued": office.waiting,
        "watchers": office.watchers,
    }


_LOOPBACK = ("127.", "[::1]", "localhost:")


def _warnings(settings: Settings, machine: Machine) -> Iterator[str]:
    for objection in machine.objections:
        if objection.name.endswith(" version"):
            yield f"{objection.detail}; `rlm doctor` says what to do"
    if settings.debug_switches:
        yield (
            f"{', '.join(settings.debug_switches)} may write what models and cells say to this"
            " terminal, control characters included"
        )
    if settings.service.tls_cert_file is None:
        for address in (settings.service.grpc, settings.service.http):
            if address != OFF and not address.startswith(_LOOPBACK):
                yield f"{address} has no TLS: whoever is on its network reads keys and answers"
    if settings.service.metrics != OFF and not settings.service.metrics.startswith(_LOOPBACK):
        yield f"{settings.service.metrics} takes no key: whoever reaches it reads all tenants' totals"
