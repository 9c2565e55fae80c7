"""The command `rlm`.

Typer and the light modules only: what needs docker, grpc, anthropic or rich is imported by the command that
uses it, so that `rlm --help` does not wait a second for them. The environment is read in `environment`.
"""

import os
from dataclasses import asdict
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from orchestrator.cli import amounts, environment, exits, held_signals, provider
from orchestrator.cli.books import commands as books
from orchestrator.cli.remote import commands as remote
from orchestrator.cli.remote.connection import Connection, connectable
from orchestrator.config import DEFAULT_MODEL, DEFAULT_SUB_MODEL
from orchestrator.conversation import Dialect
from orchestrator.errors import OrchestratorError
from orchestrator.limits import RunLimits

_MOST = 1_000_000_000_000
"""Of anything counted. More is a slip of the finger, and too much for a protocol's 64 bits somewhere."""
_DEFAULTS = RunLimits()

# Typer's own rich output costs a quarter of a second at import, for a help page.
app = typer.Typer(
    help="Answers questions about contexts far larger than any model's window.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
image = typer.Typer(help="The sandbox image.", no_args_is_help=True)
app.add_typer(image, name="image")
app.add_typer(remote.runs, name="runs")
app.add_typer(remote.contexts, name="contexts")
app.command()(remote.usage)
app.add_typer(books.tenants, name="tenants")
app.add_typer(books.keys, name="keys")
app.command()(books.audit)


class Runtime(StrEnum):
    """The OCI runtimes a sandbox can have."""

    RUNC = "runc"
    RUNSC = "runsc"


@app.command()
@connectable
def run(
    typed: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What is asked about the context.")],
    *,
    context: Annotated[
        list[Path], typer.Option(metavar="PATH", help="A file, a directory or an archive. Repeatable.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"{DEFAULT_MODEL} unless given. scripted:FILE.py is a model played by a script.",
        ),
    ] = None,
    sub_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help=f"For sub-calls and child runs: --model if given, else {DEFAULT_SUB_MODEL}."
        ),
    ] = None,
    allow_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="A model that cells may ask for besides, and a name of yours for it. Repeatable.",
        ),
    ] = None,
    base_url: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Any server that speaks the Anthropic Messages API.", show_default=False
        ),
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=_MOST, help="Of the run tree, in and out, cached ones too.")
    ] = _DEFAULTS.max_tokens,
    max_cost_usd: Annotated[
        int,
        typer.Option(
            parser=amounts.microusd,
            metavar="USD",
            help="Of the run tree.",
            show_default=str(Decimal(_DEFAULTS.max_cost_microusd) / 1_000_000),
        ),
    ] = _DEFAULTS.max_cost_microusd,
    max_calls: Annotated[
        int, typer.Option(metavar="N", min=1, max=_MOST, help="Billed model calls of the run tree.")
    ] = _DEFAULTS.max_calls,
    max_child_runs: Annotated[
        int, typer.Option(metavar="N", min=0, max=_MOST, help="Of the run tree.")
    ] = _DEFAULTS.max_child_runs,
    max_depth: Annotated[
        int, typer.Option(metavar="N", min=0, max=100, help="0 forbids child runs.")
    ] = _DEFAULTS.max_depth,
    max_turns: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Of each run.")
    ] = _DEFAULTS.max_turns,
    max_concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000, help="Model calls in flight at once.")
    ] = _DEFAULTS.max_concurrency,
    deadline_s: Annotated[
        float, typer.Option(parser=amounts.seconds, metavar="SECONDS", help="For the whole run.")
    ] = _DEFAULTS.deadline_s,
    cell_timeout_s: Annotated[
        float,
        typer.Option(
            parser=amounts.seconds, metavar="SECONDS", help="For a cell, without waiting for sub-calls."
        ),
    ] = _DEFAULTS.cell_timeout_s,
    dialect: Annotated[
        Dialect, typer.Option(help="How models ask for cells; fences for those without tool use.")
    ] = Dialect.TOOLS,
    runtime: Annotated[
        Runtime | None,
        typer.Option(help="runsc is gVisor; runc unless the settings hold this tenant to gVisor."),
    ] = None,
    memoise: Annotated[bool, typer.Option("--memoise", help="Ask identical sub-calls once.")] = False,
    price_input: Annotated[
        Decimal | None,
        typer.Option(parser=amounts.usd, metavar="USD", help="A million input tokens; if not known."),
    ] = None,
    price_output: Annotated[
        Decimal | None,
        typer.Option(parser=amounts.usd, metavar="USD", help="A million output tokens."),
    ] = None,
    window_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1_000, max=_MOST, help="Of models priced so, 200,000 unless given."),
    ] = None,
    events: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write every event here (docs/events.md).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of the answer.")] = False,
    connection: Connection | None,
) -> None:
    """Answer QUESTION about the context; only the answer goes to stdout.

    With --server it is answered there: what is not given is then the tenant's default, and Ctrl-C asks the
    server to cancel.

    Exit code: 0 answered, 1 ended without an answer, 2 wrong use, 3 the machine lacks something.
    """
    if not question.strip():
        raise typer.BadParameter("the question is empty.", param_hint="'QUESTION'")
    if (price_input is None) != (price_output is None):
        raise typer.BadParameter("give both prices or neither.", param_hint="'--price-input'")
    if base_url and (urlsplit(base_url).scheme not in {"http", "https"} or not urlsplit(base_url).hostname):
        raise typer.BadParameter(f"{base_url!r} is not an http or https address.", param_hint="'--base-url'")
    limits = RunLimits(
        max_tokens=max_tokens,
        max_cost_microusd=max_cost_usd,
        max_calls=max_calls,
        max_child_runs=max_child_runs,
        max_depth=max_depth,
        max_turns=max_turns,
        max_concurrency=max_concurrency,
        deadline_s=deadline_s,
        cell_timeout_s=cell_timeout_s,
        # The other two clocks of a cell must not undercut the one that was asked for.
        cell_cpu_s=max(_DEFAULTS.cell_cpu_s, cell_timeout_s),
        cell_ceiling_s=max(_DEFAULTS.cell_ceiling_s, cell_timeout_s),
    )
    # What the shell handed over may not be UTF-8; the model gets replacement characters.
    question = os.fsencode(question).decode("utf-8", "replace")
    if connection is not None:
        asked = _given(typed, limits) | {
            "model": model,
            "sub_model": sub_model,
            "allow_models": tuple(allow_model or ()),
            "runtime": runtime.value if runtime else None,
            "memoise": memoise,
        }
        raise typer.Exit(_run_on(connection, typed, question, context, asked, events=events, as_json=as_json))
    settings = environment.settings()
    named = (model or DEFAULT_MODEL, sub_model or (model or DEFAULT_SUB_MODEL), *(allow_model or ()))
    # A signal during the imports must find somebody who prints the object of --json.
    with held_signals.held(), provider.started_for(named, settings, base_url) as provider_process:
        from orchestrator.app import RunOptions  # noqa: PLC0415 - a second of docker, grpc and rich
        from orchestrator.cli import run as command  # noqa: PLC0415 - likewise
        from orchestrator.cli.live import stderr_can_be_redrawn  # noqa: PLC0415 - likewise

        options = RunOptions(
            question=question,
            context_paths=tuple(context),
            model=model or DEFAULT_MODEL,
            sub_model=sub_model or ("" if model else DEFAULT_SUB_MODEL),
            allow_models=tuple(allow_model or ()),
            dialect=dialect,
            runtime=runtime.value if runtime else None,
            memoise=memoise,
            limits=limits,
            price_input_usd_per_mtok=price_input,
            price_output_usd_per_mtok=price_output,
            window_tokens=window_tokens,
        )
        code = command.run(
            options,
            settings,
            provider=provider_process,
            events_path=events,
            as_json=as_json,
            live=stderr_can_be_redrawn(environment.terminal()),
        )
    raise typer.Exit(code)


def _given(typed: typer.Context, limits: RunLimits) -> dict[str, object]:
    """Of options with a default, those that were typed: a server has defaults of its own."""
    values = {**asdict(limits), "dialect": typed.params["dialect"].value}
    # As they are called on the command line.
    names = {name: "max_cost_usd" if name == "max_cost_microusd" else name for name in values}
    return {name: value for name, value in values.items() if _is_typed(typed, names[name])}


def _run_on(
    connection: Connection,
    typed: typer.Context,
    question: str,
    context: list[Path],
    options: dict[str, object],
    *,
    events: Path | None,
    as_json: bool,
) -> int:
    for name in ("base_url", "price_input", "price_output", "window_tokens"):
        if _is_typed(typed, name):
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter("with --server that is the server's.", param_hint=f"'{option}'")
    # A misspelt setting is told of, as without a server.
    environment.settings()
    with held_signals.held():
        from orchestrator.cli.live import stderr_can_be_redrawn  # noqa: PLC0415 - rich
        from orchestrator.cli.remote import asking as command  # noqa: PLC0415 - grpc and rich

        return command.ask(
            connection,
            command.question(question, context, options),
            events_path=events,
            as_json=as_json,
            live=stderr_can_be_redrawn(environment.terminal()),
        )


def _is_typed(typed: typer.Context, name: str) -> bool:
    source = typed.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def serve(
    *,
    grpc: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The client port.", show_default="127.0.0.1:7443")
    ] = "",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="off for none.", show_default="127.0.0.1:7480")
    ] = "",
    store: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="sqlite:///FILE or postgresql://...; a file of the state directory unless given.",
        ),
    ] = "",
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of this server alone, and with a short path.")
    ] = None,
    base_url: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Any server that speaks the Anthropic Messages API.", show_default=False
        ),
    ] = "",
) -> None:
    """Serve runs to clients of several tenants until SIGTERM; prints one line when ready.

    Each option has a setting too: RLM_GRPC, RLM_HTTP, RLM_STORE, RLM_STATE_DIR, RLM_BASE_URL.

    Exit code: 0 ended by a signal, 2 wrong use, 3 the machine lacks something.
    """
    given = {
        "RLM_GRPC": grpc,
        "RLM_HTTP": http,
        "RLM_STORE": store,
        "RLM_STATE_DIR": str(state_dir or ""),
        "RLM_BASE_URL": base_url,
    }
    settings = environment.settings({name: value for name, value in given.items() if value})
    service = settings.service
    named = (service.model, service.sub_model)
    with held_signals.held(), provider.started_for(named, settings, service.base_url) as provider_process:
        from orchestrator.cli import serve as command  # noqa: PLC0415 - as in `run`

        code = command.run(settings, provider_process)
    raise typer.Exit(code)


@app.command()
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Attack sandboxes of your own on this machine, and print a table.")
    ] = False,
    runtime: Annotated[
        Runtime | None, typer.Option(help="With --probe: on this one; on each that works unless given.")
    ] = None,
) -> None:
    """Look at the engine, its runtimes, the image and the key, and say what to do about each.

    Exit code: 0 all is well, 1 stopped, 2 wrong use, 3 something is missing or a door is open.
    """
    if runtime and not probe:
        raise typer.BadParameter("it goes with --probe.", param_hint="'--runtime'")
    settings = environment.settings()
    base_url = settings.service.base_url
    with held_signals.held(), provider.started(settings, base_url) as provider_process:
        from orchestrator.cli import doctor as command  # noqa: PLC0415 - as in `run`

        code = command.doctor(
            settings,
            provider_process,
            as_json=as_json,
            probe=probe,
            runtime=runtime.value if runtime else None,
        )
    raise typer.Exit(code)


@image.command("build")
def image_build() -> None:
    """Build the sandbox image of the present sources, unless it is there."""
    settings = environment.settings()
    from orchestrator.cli import image as command  # noqa: PLC0415 - docker

    raise typer.Exit(command.build(settings))


@image.command("save")
def image_save(
    file: Annotated[str, typer.Argument(metavar="FILE", help="- for standard output.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the sandbox image into FILE, for a machine without a registry."""
    settings = environment.settings()
    from orchestrator.cli import image as command  # noqa: PLC0415 - docker

    raise typer.Exit(command.save(settings, file, force=force))


@image.command("load")
def image_load(
    file: Annotated[str, typer.Argument(metavar="FILE", help="As `save` wrote it; - for standard input.")],
    *,
    expected_id: Annotated[
        str, typer.Option("--id", metavar="sha256:...", help="The id that `save` told; another is refused.")
    ] = "",
) -> None:
    """Give the engine the sandbox image in FILE, if it is whole and of the present sources."""
    environment.settings()
    from orchestrator.cli import image as command  # noqa: PLC0415 - docker

    raise typer.Exit(command.load(file, expected_id=expected_id))


@image.command("show")
def image_show(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="The engine's image unless given.")] = "",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
) -> None:
    """Print what the sandbox image is and what it holds: packages, wheels, hashes."""
    settings = environment.settings()
    from orchestrator.cli import image as command  # noqa: PLC0415 - docker

    raise typer.Exit(command.show(settings, file, as_json=as_json))


@image.command("prune")
def image_prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them, and remove nothing.")] = False,
) -> None:
    """Remove images that former versions and builds left: ours, in no container, and not the present one.

    A server of another version on the same engine needs its own: end it before, or leave this.
    """
    settings = environment.settings()
    from orchestrator.cli import image as command  # noqa: PLC0415 - docker

    raise typer.Exit(command.prune(settings, dry_run=dry_run))


@image.callback()
def _image_group() -> None:
    """The sandbox image."""


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - email parsers, for one command

    exits.put(installed("rlm-orchestrator"))


def main() -> None:
    """The command line, in a process that `start` has freed of credentials."""
    environment.quieten_grpc()
    try:
        app()
    except OrchestratorError as error:
        exits.complain(error)
        raise SystemExit(exits.exit_for(error)) from None
