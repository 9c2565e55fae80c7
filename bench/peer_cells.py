"""The peers' side of `bench.peers`, run by the interpreter that has them installed.

Started as `python peer_cells.py IMAGE CONTEXT_FILE...`. Each peer is driven through its own public classes.
Prints one line when all are ready; then, for each line of standard input, which names a way, how many seconds
its cell took. Ends with its standard input.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CELL = "x += 1; print(x)"
CONTEXT_IN_SANDBOX = "/sandbox/context.txt"

Cell = Callable[[], str]


def rlms(stack: ExitStack, image: str, context: Path) -> Cell:
    """`rlm.environments.DockerREPL`: the namespace is loaded and dumped with dill around each cell."""
    from rlm.environments.docker_repl import DockerREPL  # noqa: PLC0415 - seconds, and not ours

    repl: Any = stack.enter_context(
        DockerREPL(image=image, context_payload=context.read_text(), persistent=True)
    )
    repl.execute_code("x = 0")
    return lambda: str(repl.execute_code(CELL).stdout)


def llm_sandbox(stack: ExitStack, image: str, context: Path) -> Cell:
    """`llm_sandbox.SandboxSession`: a new Python process for each cell, hence no namespace.

    So the cell makes its own `x`, and does not read the context; both are in the peer's favour.
    """
    from llm_sandbox import SandboxSession  # noqa: PLC0415 - seconds, and not ours

    # Skipped: a virtual environment and an upgrade of pip, from a registry.
    session: Any = stack.enter_context(
        SandboxSession(lang="python", image=image, keep_template=True, skip_environment_setup=True)
    )
    session.copy_to_runtime(str(context), CONTEXT_IN_SANDBOX)
    return lambda: str(session.run(f"x = 0\n{CELL}").stdout)


def llm_sandbox_interactive(stack: ExitStack, image: str, context: Path) -> Cell:
    """`llm_sandbox.InteractiveSandboxSession`: an IPython process that looks for cells every 0.1 s."""
    from llm_sandbox import InteractiveSandboxSession  # noqa: PLC0415 - seconds, and not ours

    session: Any = stack.enter_context(
        InteractiveSandboxSession(lang="python", image=image, keep_template=True, skip_environment_setup=True)
    )
    session.copy_to_runtime(str(context), CONTEXT_IN_SANDBOX)
    session.run(f"context = open({CONTEXT_IN_SANDBOX!r}).read()\nx = 0")
    return lambda: str(session.run(CELL).stdout)


WAYS = {
    "rlms": rlms,
    "llm-sandbox": llm_sandbox,
    "llm-sandbox, interactive": llm_sandbox_interactive,
}


def main() -> None:
    """Serve the peers' cells, one after the other."""
    image, contexts = sys.argv[1], [Path(name) for name in sys.argv[2:]]
    with ExitStack() as stack:
        ready: dict[str, Cell] = {}
        failed: dict[str, str] = {}
        for name, way in WAYS.items():
            for context in contexts:
                try:
                    ready[f"{name}, {context.stem}"] = way(stack, image, context)
                except Exception as error:
                    failed[f"{name}, {context.stem}"] = f"{type(error).__name__}: {error}"
        print(json.dumps({"ready": list(ready), "failed": failed}), flush=True)
        for line in sys.stdin:
            started_s = time.perf_counter()
            printed = ready[line.rstrip("\n")]()
            took_s = time.perf_counter() - started_s
            print(json.dumps({"took_s": took_s, "printed": printed.strip()}), flush=True)


if __name__ == "__main__":
    main()
