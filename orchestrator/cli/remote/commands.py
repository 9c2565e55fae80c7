"""`rlm runs`, `rlm contexts` and `rlm usage`: their arguments. What they do is imported when it is done."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import environment, held_signals
from orchestrator.cli.remote.connection import Connection, connected

runs = typer.Typer(help="Runs on a server.", no_args_is_help=True)
contexts = typer.Typer(help="Contexts on a server.", no_args_is_help=True)

_RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `rlm runs list` shows it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one object.")]
_Most = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1_000_000, help="At most so many.")]


class State(StrEnum):
    """Where a run can stand."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    ENDED = "ended"


@runs.command("list")
@connected
def runs_list(
    connection: Connection,
    *,
    state: Annotated[list[State] | None, typer.Option(help="Only these. Repeatable.")] = None,
    outcome: Annotated[
        list[str] | None, typer.Option(metavar="OUTCOME", help="Only these, like answered. Repeatable.")
    ] = None,
    most: _Most = 50,
    as_json: _Json = False,
) -> None:
    """List runs, newest first."""
    with held_signals.held():
        from orchestrator.cli.remote import runs as command  # noqa: PLC0415 - grpc

        command.show_list(
            connection,
            states=[one.value for one in state or ()],
            outcomes=outcome or (),
            most=most,
            as_json=as_json,
        )


@runs.command("show")
@connected
def runs_show(connection: Connection, run_id: _RunId, *, as_json: _Json = False) -> None:
    """Show a run and its answer."""
    with held_signals.held():
        from orchestrator.cli.remote import runs as command  # noqa: PLC0415 - as above

        command.show(connection, run_id, as_json=as_json)


@runs.command("watch")
@connected
def runs_watch(
    connection: Connection,
    run_id: _RunId,
    *,
    events: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write every event here (docs/events.md).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of the answer.")] = False,
) -> None:
    """Show a run from its beginning until it has ended, and its answer, like `rlm run`.

    Ctrl-C ends the watching, not the run. Exit code: as of `rlm run`.
    """
    with held_signals.held():
        from orchestrator.cli.live import stderr_can_be_redrawn  # noqa: PLC0415 - rich
        from orchestrator.cli.remote import asking as command  # noqa: PLC0415 - grpc and rich

        code = command.watch(
            connection,
            run_id,
            events_path=events,
            as_json=as_json,
            live=stderr_can_be_redrawn(environment.terminal()),
        )
    raise typer.Exit(code)


@runs.command("cancel")
@connected
def runs_cancel(connection: Connection, run_id: _RunId, *, as_json: _Json = False) -> None:
    """End a run as cancelled. One that has ended stays as it is."""
    with held_signals.held():
        from orchestrator.cli.remote import runs as command  # noqa: PLC0415 - as above

        command.cancel(connection, run_id, as_json=as_json)


@runs.command("resume")
@connected
def runs_resume(connection: Connection, run_id: _RunId, *, as_json: _Json = False) -> None:
    """Go on with an interrupted run that its server did not resume by itself."""
    with held_signals.held():
        from orchestrator.cli.remote import runs as command  # noqa: PLC0415 - as above

        command.resume(connection, run_id, as_json=as_json)


@runs.command("delete")
@connected
def runs_delete(connection: Connection, run_id: _RunId, *, as_json: _Json = False) -> None:
    """Remove an ended run's events, texts and answer for good."""
    with held_signals.held():
        from orchestrator.cli.remote import runs as command  # noqa: PLC0415 - as above

        command.delete(connection, run_id, as_json=as_json)


@runs.command("export")
@connected
def runs_export(
    connection: Connection,
    run_id: _RunId,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A new directory, or a new file named .tar.")
    ],
    *,
    as_json: _Json = False,
) -> None:
    """Write a run, its events, its long texts and its answer into a directory or an archive."""
    with held_signals.held():
        from orchestrator.cli.remote import export as command  # noqa: PLC0415 - as above

        command.export(connection, run_id, target, as_json=as_json)


@contexts.command("list")
@connected
def contexts_list(connection: Connection, *, most: _Most = 50, as_json: _Json = False) -> None:
    """List contexts, newest first."""
    with held_signals.held():
        from orchestrator.cli.remote import contexts as command  # noqa: PLC0415 - as above

        command.show_list(connection, most=most, as_json=as_json)


@contexts.command("upload")
@connected
def contexts_upload(
    connection: Connection,
    path: Annotated[list[Path], typer.Argument(metavar="PATH...", help="A file, a directory or an archive.")],
    *,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of the path's own; how it ends counts.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Send a context, or what is missing of it, and print its id."""
    with held_signals.held():
        from orchestrator.cli.remote import contexts as command  # noqa: PLC0415 - as above

        command.upload(connection, path, name=name, as_json=as_json)


@contexts.command("delete")
@connected
def contexts_delete(
    connection: Connection,
    context_id: Annotated[str, typer.Argument(metavar="CONTEXT_ID", help="As `rlm contexts list` shows it.")],
    *,
    as_json: _Json = False,
) -> None:
    """Remove a context for good."""
    with held_signals.held():
        from orchestrator.cli.remote import contexts as command  # noqa: PLC0415 - as above

        command.delete(connection, context_id, as_json=as_json)


@connected
def usage(connection: Connection, *, as_json: _Json = False) -> None:
    """Show what the key's tenant has used today and this month (UTC), and what it may."""
    with held_signals.held():
        from orchestrator.cli.remote import usage as command  # noqa: PLC0415 - as above

        command.show(connection, as_json=as_json)
