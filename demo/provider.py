"""What a provider's fake says in docs/first-deployment.md: one cell, one sub-call, whatever is asked.

python -m tests.fakes.anthropic_server --script demo/provider.py --port 8976
"""

from typing import Any

from tests.fakes.anthropic_server import Blocks, Call, Say

CELL = """\
text = context if isinstance(context, str) else "\\n".join(context[path] for path in context)
errors = [line for line in text.splitlines() if "ERROR" in line]
what = llm_query("In three words: what went wrong?\\n" + "\\n".join(errors[:20]))
FINAL(f"{len(errors)} lines say ERROR: {what}")
"""


def respond(request: dict[str, Any]) -> Blocks:
    """A root run is offered the tool `python`, a sub-call is not."""
    return Call(CELL) if request.get("tools") else Say("disk was full")
