"""40 sub-calls one after the other, each of which takes a while: a run that somebody can interrupt.

Each call is written to `asked`, beside the state directory of the server that makes it.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

ASKED = Path(sys.argv[sys.argv.index("--state-dir") + 1]).parent / "asked"


def run(question: str, _depth: int) -> Iterator[str]:
    """One cell with all of them; `How long?` is answered at once."""
    if question == "How long?":
        yield "FINAL(str(len(context)))"
    yield f"said = [llm_query(f'{question} {{number}}') for number in range(40)]\nprint(len(said))"
    yield "FINAL(str(sum(map(int, said))))"


def complete(prompt: str) -> str:
    """Its number."""
    with open(ASKED, "a") as log:
        log.write(prompt + "\n")
    time.sleep(0.15)
    return prompt.rsplit(maxsplit=1)[-1]
