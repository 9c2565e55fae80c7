"""`rlm serve`: the service, until a signal."""

import asyncio
import logging
from contextlib import ExitStack

from orchestrator.cli import exits, signals
from orchestrator.cli.exits import Exit
from orchestrator.cli.log_lines import LogLines
from orchestrator.collector import collecting_seldom
from orchestrator.config import Settings
from orchestrator.errors import OrchestratorError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.server.serve import Served, serve

_log = logging.getLogger(__name__)


def run(settings: Settings, provider: ProviderProcess | None) -> Exit:
    """Serve until SIGTERM or Ctrl-C, drain, and leave what runs to the next server.

    stdout gets one line, when clients may come.
    """
    with ExitStack() as stack:
        handler = LogLines(as_json=settings.service.log_json)
        root = logging.getLogger()
        root.addHandler(handler)
        stack.callback(root.removeHandler, handler)
        logging.getLogger("orchestrator").setLevel(logging.INFO)
        stack.enter_context(collecting_seldom())
        try:
            return asyncio.run(_serve(settings, provider))
        except OrchestratorError as error:
            _log.error("%s", error)
            return exits.exit_for(error)


async def _serve(settings: Settings, provider: ProviderProcess | None) -> Exit:
    stop = asyncio.Event()

    def stopping(signals_so_far: int) -> None:
        if signals_so_far == 1:
            grace_s = settings.service.drain_s
            _log.info("draining: what runs has %.0f s; a second signal cuts that short", grace_s)
            stop.set()
        elif signals_so_far == 2:
            _log.info("leaving what runs to the next server")
            work.cancel()

    work = asyncio.create_task(
        serve(settings, provider, stop=stop, on_ready=_ready, say=lambda line: _log.warning("%s", line))
    )
    with signals.heard(stopping):
        await asyncio.wait((work,))
    if work.cancelled():
        return Exit.DONE
    work.result()
    return Exit.DONE


def _ready(served: Served) -> None:
    http = f", http {served.http}" if served.http else ""
    metrics = f", metrics {served.metrics}" if served.metrics else ""
    exits.put(f"ready: grpc {served.grpc}{http}{metrics}")
