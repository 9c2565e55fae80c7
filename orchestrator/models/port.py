"""What the loop and the broker ask of a model, whoever serves it."""

from dataclasses import dataclass
from typing import Protocol

from orchestrator.conversation import Conversation, Reply
from orchestrator.pricing import ModelCard, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """One request, complete: a client adds nothing that costs tokens but its own wire format."""

    model: str
    system: str
    """Empty for sub-calls."""
    conversation: Conversation
    python_tool: bool
    """Whether the model may ask for a cell."""
    max_tokens: int
    timeout_s: float
    """For this attempt. The client must give up by itself."""
    stop_sequences: tuple[str, ...] = ()
    """The reply ends before any of these."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply and what it cost."""

    reply: Reply
    usage: Usage


class ModelClient(Protocol):
    """One attempt at a model provider. Retrying and paying are the caller's business.

    One contract suite (`tests/contract/test_model_client.py`) runs over every implementation.
    """

    async def complete(self, request: ModelRequest) -> Completion:
        """Send the request once.

        Cancelling it ends the attempt; the caller then has to assume that it was billed.

        Raises:
            ModelError: The attempt failed. `billing` says what it may have cost, `retryable` whether to try
                again.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Calls in flight fail."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """A model a run may use: what we know of it and who serves it."""

    card: ModelCard
    client: ModelClient
