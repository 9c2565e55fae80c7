"""`rlm` with a run that asks one sub-call and then waits: for looking at its memory from outside.

It writes the provider process's pid into `asked`, beside the first context path, once the reply is there.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from orchestrator import app
from orchestrator.access import open_models
from orchestrator.app import RunOptions
from orchestrator.cli.start import main
from orchestrator.config import Settings
from orchestrator.conversation import Told
from orchestrator.errors import ModelError
from orchestrator.models.choice import Wanted
from orchestrator.models.port import ModelRequest
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.run_report import RunReport
from orchestrator.runs.recorder import Observer


async def _run(
    options: RunOptions,
    settings: Settings,
    *,
    provider: ProviderProcess | None = None,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> RunReport:
    assert provider is not None
    roles = {"root": options.model, "sub": options.model}
    request = ModelRequest(
        model=options.model,
        system="",
        conversation=(Told(options.question),),
        python_tool=False,
        max_tokens=100,
        timeout_s=30.0,
    )
    async with open_models(Wanted(roles=roles), settings, provider) as models:
        with suppress(ModelError):
            await models["root"].client.complete(request)
        asked = options.context_paths[0].with_name("asked")
        asked.with_suffix(".part").write_text(str(provider.pid))
        asked.with_suffix(".part").rename(asked)
        await asyncio.sleep(3_600)
    raise AssertionError


if __name__ == "__main__":
    app.run = _run
    main()
