"""The whole service on a real port and a real SQLite file; only sandbox and provider are played.

`open_server` twice on one directory is a server and the next one after it.
"""

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from rlm_proto.v1 import run_pb2_grpc

from orchestrator.access import ModelAccess
from orchestrator.contexts.store import ContextStore
from orchestrator.ids import TenantId
from orchestrator.machine import Machine
from orchestrator.models.choice import Policy
from orchestrator.models.port import ModelClient
from orchestrator.models.price_file import PriceList
from orchestrator.runs.admission import SandboxSlots
from orchestrator.sandbox.instance import claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.sandbox.making import SandboxMaker
from orchestrator.sandbox.pool import SandboxPool
from orchestrator.server.admin_shell import admin_service
from orchestrator.server.grpc_shell import Port, Tls, open_port
from orchestrator.server.serve import accounts_of, admin_of, books_of
from orchestrator.service.admin import AdminOffice
from orchestrator.service.books import Books
from orchestrator.service.hooks import ServiceHook
from orchestrator.service.office import OfficeParts, ServiceOffice, open_office
from orchestrator.service.presence import LEASE_S
from orchestrator.service.rules import Offer
from orchestrator.store.books import Role, TenantRow, TenantRules
from orchestrator.store.database import Database, open_database
from orchestrator.store.sql_operators import SqlOperatorBook
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.tree import CARD

HOME = "home-of-tests"
_migrated: list[bytes] = []
"""The file of an empty database: making its tables takes longer than most tests."""


async def new_database(file: Path) -> str:
    """The URL of a SQLite file, which is made with its tables unless it is there."""
    url = f"sqlite:///{file}"
    if not _migrated:
        with tempfile.TemporaryDirectory(prefix="rlm") as directory:
            async with open_database(f"sqlite:///{directory}/empty.db"):
                pass
            _migrated.append(_read(directory))
    _copy(file)
    return url


def _read(directory: str) -> bytes:
    return (Path(directory) / "empty.db").read_bytes()


def _copy(file: Path) -> None:
    if not file.exists():
        file.write_bytes(_migrated[0])


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant and a key of each role."""

    tenant: TenantRow
    read: str
    run: str
    admin: str

    @property
    def tenant_id(self) -> TenantId:
        return self.tenant.tenant_id


@dataclass(frozen=True, slots=True)
class Server:
    """One server while it is up."""

    office: ServiceOffice
    books: Books
    port: Port
    driver: InProcessDriver
    directory: Path
    database: Database
    admin: AdminOffice

    async def operator(self) -> str:
        """A key of the installation."""
        return (await SqlOperatorBook(self.database).add_key())[1]

    async def account(self, name: str, rules: TenantRules | None = None) -> Account:
        """A new tenant."""
        tenant = await self.books.tenants.add_tenant(name, rules or TenantRules())
        keys = {role: (await self.books.tenants.add_key(tenant.tenant_id, role))[1] for role in Role}
        return Account(tenant, keys[Role.READ], keys[Role.RUN], keys[Role.ADMIN])

    async def drain(self) -> None:
        """As SIGTERM does."""
        await self.port.shut()
        await self.office.drain()

    @asynccontextmanager
    async def stub(self) -> AsyncIterator["run_pb2_grpc.RunServiceAsyncStub"]:
        """A client's."""
        async with grpc.aio.insecure_channel(self.port.address) as channel:
            yield run_pb2_grpc.RunServiceStub(channel)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A state directory: a socket's path in it has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        yield Path(directory)


@asynccontextmanager
async def open_server(
    directory: Path,
    client: ModelClient,
    *,
    sandboxes: int = 16,
    max_running: int = 64,
    max_model_calls: int = 256,
    drain_s: float = 10.0,
    models_allowed: Sequence[str] = (),
    hooks: Sequence[ServiceHook] = (),
    tls: Tls | None = None,
    driver: InProcessDriver | None = None,
    store_url: str = "",
    home: str = HOME,
    lease_s: float = LEASE_S,
) -> AsyncIterator[Server]:
    """A server for the length of the block; its end is that of a server that had no time to drain.

    Servers with one `store_url`, and each a `home` of its own, share a database.
    """
    async with AsyncExitStack() as stack:
        instance = stack.enter_context(claim_instance(directory))
        contexts = ContextStore(instance.contexts_dir)
        stack.callback(contexts.close)
        driver = driver or InProcessDriver()
        stack.push_async_callback(driver.aclose)
        machine = Machine(
            contexts=contexts,
            leases=SandboxLeases(instance, driver, memory_bytes=1 << 30),
            slots=SandboxSlots(sandboxes),
            pool=SandboxPool(SandboxMaker(instance, driver)),
        )
        url = store_url or await new_database(directory / "service.db")
        database = await stack.enter_async_context(open_database(url, patience_s=1.0))
        books = books_of(database)
        policy = Policy(prices=PriceList(cards={CARD.name: CARD}), allowed=models_allowed)
        office = await stack.enter_async_context(
            open_office(
                OfficeParts(
                    books=books,
                    machine=machine,
                    models=ModelAccess(policy, client),
                    offer=Offer(
                        model=CARD.name,
                        sub_model=CARD.name,
                        models_allowed=models_allowed,
                        runtimes=("runc",),
                        max_sandboxes=sandboxes,
                    ),
                    open_account=accounts_of(books),
                    contexts_dir=directory / "service" / "contexts",
                    home=home,
                    max_running=max_running,
                    max_model_calls=max_model_calls,
                    drain_grace_s=drain_s,
                    lease_s=lease_s,
                    hooks=hooks,
                )
            )
        )
        admin = admin_of(books, database, office)
        port = await stack.enter_async_context(
            open_port(office, "127.0.0.1:0", tls=tls, also=(admin_service(admin),))
        )
        yield Server(office, books, port, driver, directory, database, admin)
