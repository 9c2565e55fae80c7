"""A circuit breaker for each account at a provider: waiting calls must not hammer one that is down.

Rules, in `Breaker`, which has no clock and no I/O of its own:

1. Closed, it lets everything through. `FAILURES_TO_OPEN` failures of the *provider* in a row open it: no
   connection, a drop, a time-out, a 5xx, a 529. A success sets the count back to zero. What concerns one
   request or one caller counts for nothing: a 4xx, and a 429 above all, so that one tenant's rate limit is
   never another's outage.
2. Open, it refuses at once, and says when to come back. It stays open for `FIRST_PAUSE_S`, twice as long
   after each failed probe, `LONGEST_PAUSE_S` at most.
3. After the pause one call goes through as a probe, and only one; the others are still refused. Its success
   closes the breaker, its failure opens it again. A probe that never reports counts as failed after a pause.

So a provider that is down sees at most one call per pause, and one that is back is found within a pause.

A key that the provider does not accept opens nothing: each call hears it at once, and nothing is billed. But
it is every caller's trouble, and remembered as that (`GuardedClient.trouble`) until a call gets past it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import Billing, ModelError
from orchestrator.models.port import Completion, ModelClient, ModelRequest

FAILURES_TO_OPEN = 8
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0

_FIRST_SERVER_ERROR = 500
_KEY_REFUSED = 401


@dataclass(slots=True)
class Breaker:
    """The state of one breaker. Times are seconds of the caller's monotonic clock."""

    failures: int = 0
    open_until_s: float | None = None
    """None while closed."""
    pause_s: float = FIRST_PAUSE_S

    def refused_for_s(self, now_s: float) -> float:
        """How long to stay away; 0 lets this call through, as the probe if the breaker is open."""
        if self.open_until_s is None:
            return 0.0
        if now_s < self.open_until_s:
            return self.open_until_s - now_s
        # This call is the probe. Until it reports, the others wait as if it had failed.
        self.open_until_s = now_s + self.pause_s
        return 0.0

    def succeeded(self) -> None:
        """A call came back with a reply, or with an error that shows the provider works."""
        self.failures = 0
        self.open_until_s = None
        self.pause_s = FIRST_PAUSE_S

    def failed(self, now_s: float, *, probe: bool) -> None:
        """The provider failed a call. One that set out before the breaker opened says nothing new."""
        self.failures += 1
        if probe:
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
            self.open_until_s = now_s + self.pause_s
        elif self.open_until_s is None and self.failures >= FAILURES_TO_OPEN:
            self.open_until_s = now_s + self.pause_s


class GuardedClient:
    """A `ModelClient` behind a breaker."""

    def __init__(self, client: ModelClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._breaker = Breaker()
        self._failure: ModelError | None = None
        """The last one that was every caller's."""
        self._key_refused_at_s: float | None = None

    @property
    def trouble(self) -> ModelError | None:
        """Why calls are likely to fail now, whoever makes them; None while nothing speaks against them."""
        return self._failure if self._is_open or self.is_key_refused else None

    @property
    def is_key_refused(self) -> bool:
        """Whether the provider did not accept the key when it was last asked."""
        return self._key_refused_at_s is not None and not self._is_open

    @property
    def may_be_over(self) -> bool:
        """Whether a call made now would find out if the trouble is over. Until then it had better wait."""
        until_s = self._breaker.open_until_s
        if until_s is None and self._key_refused_at_s is not None:
            until_s = self._key_refused_at_s + LONGEST_PAUSE_S
        return until_s is not None and self._clock() >= until_s

    def reached(self) -> None:
        """Its address accepts connections: somebody else found out, who asked it nothing."""
        if self._is_open and self._failure is not None and _never_got_there(self._failure):
            self._works()

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient.complete`. Refuses at once, unbilled, while the provider is down."""
        probe = self._is_open
        refused_for_s = self._breaker.refused_for_s(self._clock())
        if refused_for_s:
            raise ModelError(
                "the model provider is down, as calls just before this one found",
                billing=Billing.NOTHING,
                retryable=True,
                retry_after_s=refused_for_s,
            )
        try:
            completion = await self._client.complete(request)
        except ModelError as error:
            if _is_the_providers(error):
                self._failure = error
                self._breaker.failed(self._clock(), probe=probe)
            else:
                self._works(except_for=error)
            raise
        self._works()
        return completion

    async def aclose(self) -> None:
        """See `ModelClient.aclose`."""
        await self._client.aclose()

    @property
    def _is_open(self) -> bool:
        return self._breaker.open_until_s is not None

    def _works(self, *, except_for: ModelError | None = None) -> None:
        """The provider answered, be it with a refusal."""
        self._breaker.succeeded()
        is_key_refused = except_for is not None and except_for.status == _KEY_REFUSED
        self._failure = except_for if is_key_refused else None
        self._key_refused_at_s = self._clock() if is_key_refused else None


def _is_the_providers(error: ModelError) -> bool:
    """Whether the failure says something about the provider, and not about this request or caller."""
    if not error.retryable:
        return False
    return error.status is None or error.status >= _FIRST_SERVER_ERROR


def _never_got_there(error: ModelError) -> bool:
    """Whether no request arrived: then a connection that is accepted shows that they do again."""
    return error.status is None and error.billing is Billing.NOTHING
