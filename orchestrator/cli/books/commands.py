"""`rlm tenants`, `rlm keys` and `rlm audit`: their arguments. They work on the service's database
itself; the first two may also ask a server.

What they do is imported when it is done.
"""

from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from typing import Annotated

import typer

from orchestrator.cli import environment, held_signals
from orchestrator.cli.amounts import limit, limit_usd
from orchestrator.cli.books.place import Place, Store
from orchestrator.cli.remote.connection import Connection, connectable
from orchestrator.cli.shared_options import with_options
from orchestrator.limits import RunLimits
from orchestrator.store.rule_changes import Limit, RuleChanges

tenants = typer.Typer(help="Tenants of a service: on its machine, or with --server.", no_args_is_help=True)
keys = typer.Typer(help="API keys of a service: on its machine, or with --server.", no_args_is_help=True)

DATABASE_FILE = "service.db"
"""In the state directory, unless another store is named."""

_Name = Annotated[str, typer.Argument(metavar="NAME", help="For people.")]
_Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Its name or its id.")]
_OptionalTenant = Annotated[
    str,
    typer.Argument(
        metavar="[TENANT]", help="Its name or its id; with --server by default the one of your key."
    ),
]
_Operator = Annotated[
    bool, typer.Option("--operator", help="Of the installation, and of no tenant: it manages tenants.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one object.")]


class Role(StrEnum):
    """What a key may do; each may do what those before it may."""

    READ = "read"
    RUN = "run"
    ADMIN = "admin"


def _store(
    *,
    store: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help=f"sqlite:///FILE or postgresql://…, {DATABASE_FILE} of the state directory unless given."
            " A password belongs into PGPASSFILE, not here.",
        ),
    ] = "",
) -> None:
    """The option, for its signature."""


def _read_store(*, store: str) -> Store:
    # Read in any case: a misspelt setting is told of.
    settings = environment.settings()
    by_default = f"sqlite:///{settings.state_dir.absolute() / DATABASE_FILE}"
    return Store(store or settings.service.store or by_default, is_named=bool(store))


def _both(*, store: Store, connection: Connection | None) -> None:
    """What `placed` reads, for its signature."""


def _read_place(*, store: Store, connection: Connection | None) -> Place:
    if connection is not None and store.is_named:
        raise typer.BadParameter("it contradicts --server.", param_hint="'--store'")
    return Place(store.url, connection)


def _rules(
    *,
    max_tokens_per_day: Annotated[
        Limit | None, typer.Option(parser=limit, metavar="N", help="Or none, like all limits here.")
    ] = None,
    max_cost_usd_per_day: Annotated[Limit | None, typer.Option(parser=limit_usd, metavar="USD")] = None,
    max_runs_per_day: Annotated[Limit | None, typer.Option(parser=limit, metavar="N")] = None,
    max_tokens_per_month: Annotated[Limit | None, typer.Option(parser=limit, metavar="N")] = None,
    max_cost_usd_per_month: Annotated[Limit | None, typer.Option(parser=limit_usd, metavar="USD")] = None,
    max_runs_per_month: Annotated[Limit | None, typer.Option(parser=limit, metavar="N")] = None,
    max_concurrent_runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=100_000, help="Others wait.")
    ] = None,
    max_concurrent_sandboxes: Annotated[
        Limit | None,
        typer.Option(
            parser=limit, metavar="N", help="Over all servers, with those that its runs have reserved."
        ),
    ] = None,
    max_queued_runs: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=10_000_000, help="More are refused.")
    ] = None,
    max_context_bytes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="All contexts that it keeps, together.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="A model it may name, like claude-haiku-*. Repeatable."),
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="All that the server allows, as at first.")
    ] = False,
    runtime: Annotated[
        list[str] | None, typer.Option(metavar="RUNTIME", help="runc or runsc. Repeatable.")
    ] = None,
    any_runtime: Annotated[bool, typer.Option("--any-runtime", help="Both, as at first.")] = False,
    max_limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="Of each run, like max_tokens=100000; none lifts it. Repeatable."
        ),
    ] = None,
    retention_days: Annotated[
        Limit | None,
        typer.Option(parser=limit, metavar="N", help="Ended runs and unused contexts go after so many."),
    ] = None,
) -> None:
    """The options, for their signature."""


def _read_rules(
    *,
    model: list[str] | None,
    any_model: bool,
    runtime: list[str] | None,
    any_runtime: bool,
    max_limit: list[str] | None,
    max_cost_usd_per_day: Limit | None,
    max_cost_usd_per_month: Limit | None,
    **others: Limit | int | None,
) -> RuleChanges:
    _refuse_both("--model", bool(model), any_model)
    _refuse_both("--runtime", bool(runtime), any_runtime)
    odd = [name for name in runtime or () if name not in {"runc", "runsc"}]
    if odd:
        raise typer.BadParameter(f"{odd[0]!r} is neither runc nor runsc.", param_hint="'--runtime'")
    return RuleChanges(
        models=() if any_model else tuple(model) if model else None,
        runtimes=() if any_runtime else tuple(runtime) if runtime else None,
        max_limits=dict(map(_named_limit, max_limit or ())),
        max_cost_microusd_per_day=max_cost_usd_per_day,
        max_cost_microusd_per_month=max_cost_usd_per_month,
        **others,  # type: ignore[arg-type]
    )


def _refuse_both(option: str, is_given: bool, any_is_given: bool) -> None:
    if is_given and any_is_given:
        raise typer.BadParameter(f"it contradicts --any-{option[2:]}.", param_hint=f"'{option}'")


def _named_limit(text: str) -> tuple[str, float | None]:
    name, _, amount = text.partition("=")
    known = [item.name for item in fields(RunLimits)]
    if name not in known:
        raise typer.BadParameter(f"{name[:40]!r} is none of {', '.join(known)}.", param_hint="'--max-limit'")
    return name, limit(amount).most


def _placed(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of a database and of a server, of which it gets one."""
    with_both = with_options(_both, _read_place, "place")(command)
    return with_options(_store, _read_store, "store")(connectable(with_both))


_ruled = with_options(_rules, _read_rules, "rules")


@tenants.command("add")
@_placed
@_ruled
def tenants_add(*, name: _Name, place: Place, rules: RuleChanges, as_json: _Json = False) -> None:
    """Add a tenant with a key of the role admin, which is shown this once."""
    with held_signals.held():
        from orchestrator.cli.books import tenants as command  # noqa: PLC0415 - with it what it shows

        command.add(place, name, rules, as_json=as_json)


@tenants.command("list")
@_placed
def tenants_list(*, place: Place, as_json: _Json = False) -> None:
    """List tenants and what each may do."""
    with held_signals.held():
        from orchestrator.cli.books import tenants as command  # noqa: PLC0415 - as above

        command.show_list(place, as_json=as_json)


@tenants.command("set")
@_placed
@_ruled
def tenants_set(*, tenant: _Tenant, place: Place, rules: RuleChanges, as_json: _Json = False) -> None:
    """Change what a tenant may do; what is not named stays. It counts from the next request on."""
    if rules.is_empty:
        raise typer.BadParameter("name something to change.")
    with held_signals.held():
        from orchestrator.cli.books import tenants as command  # noqa: PLC0415 - as above

        command.change(place, tenant, rules, as_json=as_json)


@tenants.command("remove")
@_placed
def tenants_remove(*, tenant: _Tenant, place: Place, as_json: _Json = False) -> None:
    """Remove a tenant with its keys, runs and contexts, for good. What it paid stays in the books."""
    with held_signals.held():
        from orchestrator.cli.books import tenants as command  # noqa: PLC0415 - as above

        command.remove(place, tenant, as_json=as_json)


@keys.command("add")
@_placed
def keys_add(
    *,
    tenant: _OptionalTenant = "",
    operator: _Operator = False,
    role: Annotated[
        Role | None, typer.Option(help="admin may delete, and make keys; run may ask; read may look.")
    ] = None,
    place: Place,
    as_json: _Json = False,
) -> None:
    """Make a key, which is shown this once."""
    if operator and role is not None:
        raise typer.BadParameter("an operator's key has none.", param_hint="'--role'")
    _check_whose(tenant, operator=operator, place=place)
    with held_signals.held():
        if operator:
            from orchestrator.cli.books import operators  # noqa: PLC0415 - sqlalchemy

            operators.add(place.store_url, as_json=as_json)
            return
        from orchestrator.cli.books import keys as command  # noqa: PLC0415 - with it what it shows

        command.add(place, tenant, (role or Role.RUN).value, as_json=as_json)


@keys.command("list")
@_placed
def keys_list(
    *, tenant: _OptionalTenant = "", operator: _Operator = False, place: Place, as_json: _Json = False
) -> None:
    """List a tenant's keys, or those of operators, without the keys."""
    _check_whose(tenant, operator=operator, place=place)
    with held_signals.held():
        if operator:
            from orchestrator.cli.books import operators  # noqa: PLC0415 - as above

            operators.show_list(place.store_url, as_json=as_json)
            return
        from orchestrator.cli.books import keys as command  # noqa: PLC0415 - as above

        command.show_list(place, tenant, as_json=as_json)


@keys.command("revoke")
@_placed
def keys_revoke(
    *,
    words: Annotated[
        list[str],
        typer.Argument(metavar="[TENANT] KEY_ID", help="As `rlm keys list` shows it, behind its tenant."),
    ],
    operator: _Operator = False,
    place: Place,
    as_json: _Json = False,
) -> None:
    """Make a key unknown. Another one has to be there before, if the tenant is to go on."""
    *tenants_named, key_id = words
    if len(tenants_named) > 1:
        raise typer.BadParameter("name one tenant and one key.", param_hint="'KEY_ID'")
    tenant = "".join(tenants_named)
    _check_whose(tenant, operator=operator, place=place)
    with held_signals.held():
        if operator:
            from orchestrator.cli.books import operators  # noqa: PLC0415 - as above

            operators.revoke(place.store_url, key_id, as_json=as_json)
            return
        from orchestrator.cli.books import keys as command  # noqa: PLC0415 - as above

        command.revoke(place, tenant, key_id, as_json=as_json)


@with_options(_store, _read_store, "store")
def audit(
    *,
    tenant: Annotated[
        str, typer.Argument(metavar="[TENANT]", help="Its name or its id; all unless given.")
    ] = "",
    after: Annotated[
        int, typer.Option(metavar="NUMBER", min=0, help="Only what came behind this entry.")
    ] = 0,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100_000)] = 1_000,
    store: Store,
    as_json: _Json = False,
) -> None:
    """Show who did what, oldest first: on the service's machine alone."""
    with held_signals.held():
        from orchestrator.cli.books import audit as command  # noqa: PLC0415 - sqlalchemy

        command.show(store.url, tenant, after=after, limit=limit, as_json=as_json)


def _check_whose(tenant: str, *, operator: bool, place: Place) -> None:
    """A server knows from its key whose is meant; beside the database nobody is meant by itself."""
    if operator and tenant:
        raise typer.BadParameter("an operator's key is no tenant's.", param_hint="'TENANT'")
    if operator and place.connection is not None:
        raise typer.BadParameter(
            "operators' keys are made, listed and revoked on the server's machine (--store).",
            param_hint="'--operator'",
        )
    if not operator and not tenant and place.connection is None:
        raise typer.BadParameter("name a tenant, or --operator.", param_hint="'TENANT'")
