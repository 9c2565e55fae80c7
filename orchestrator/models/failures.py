"""Whose failure it was: what a failed attempt at the Messages API may have cost, and whether to try again.

Rules. They live in this file and nowhere else:

1. Refused before it could be billed costs nothing: no connection, one that was closed before the whole
   request was written, any 4xx, 529.
2. Everything that broke after the request was sent may have been billed: the provider keeps no request ids
   by which a repeat would be free.
3. An error inside a stream counts by its type, not by the status 200 before it; once the stream has told its
   input usage, it may have been billed.
4. A limit of spending does not go away by waiting. Neither does an error the provider marks so.

No message carries the provider's words: an error body may echo the key, or the prompt.
"""

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from itertools import islice
from math import isfinite
from typing import NamedTuple

import aiohttp

from orchestrator.errors import Billing, ModelError


class _Verdict(NamedTuple):
    message: str
    billing: Billing
    retryable: bool


_BUSY = _Verdict("the provider is overloaded", Billing.NOTHING, retryable=True)
_RATE = _Verdict("the provider's rate limit is reached", Billing.NOTHING, retryable=True)
_SPEND = _Verdict("the provider account's spend limit is reached", Billing.NOTHING, retryable=False)
_REFUSED = _Verdict("the provider refused the request", Billing.NOTHING, retryable=False)
_BROKE = _Verdict("the provider failed", Billing.UNKNOWN, retryable=True)

_BY_STATUS: Mapping[int, _Verdict] = {
    401: _Verdict("the provider does not accept the API key", Billing.NOTHING, retryable=False),
    402: _Verdict("the provider account cannot pay", Billing.NOTHING, retryable=False),
    403: _Verdict("the API key may not do this", Billing.NOTHING, retryable=False),
    404: _Verdict("the provider knows no such model or address", Billing.NOTHING, retryable=False),
    408: _Verdict("the provider waited too long for the request", Billing.NOTHING, retryable=True),
    409: _Verdict("the provider reports a conflict", Billing.NOTHING, retryable=True),
    413: _Verdict("the request is too large for the provider", Billing.NOTHING, retryable=False),
    429: _RATE,
    529: _BUSY,
}

_BY_TYPE: Mapping[str, _Verdict] = {
    "overloaded_error": _BUSY,
    "rate_limit_error": _RATE,
    "throttlingException": _RATE,  # Bedrock's name for it, as for the next
    "serviceUnavailableException": _BUSY,
    "timeout_error": _BROKE,
    "api_error": _BROKE,
    "authentication_error": _BY_STATUS[401],
    "billing_error": _BY_STATUS[402],
    "permission_error": _BY_STATUS[403],
    "not_found_error": _BY_STATUS[404],
    "invalid_request_error": _REFUSED,
}

_NEVER_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_BAD_ADDRESS = (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}\Z")


def of_response(
    status: int, *, error_type: object = None, error_code: object = None, headers: Mapping[str, str]
) -> ModelError:
    """The failure of a response with a status other than success. Header names are in lower case."""
    if _is_spend_limit(error_code):
        verdict = _SPEND
    elif status in _BY_STATUS:
        verdict = _BY_STATUS[status]
    elif status == 503 and error_type == "overloaded_error":
        verdict = _BUSY
    else:
        verdict = _REFUSED if status < 500 else _BROKE
    final = headers.get("x-should-retry") == "false"
    return ModelError(
        f"{verdict.message} ({_details(str(status), error_type, error_code)})",
        billing=verdict.billing,
        retryable=verdict.retryable and not final,
        retry_after_s=retry_after_s(headers) if verdict.retryable else None,
        status=status,
    )


def of_stream_event(error_type: object, error_code: object = None, *, usage_told: bool) -> ModelError:
    """The failure that an error event inside a stream reports."""
    verdict = _SPEND if _is_spend_limit(error_code) else _BY_TYPE.get(str(error_type), _BROKE)
    return ModelError(
        f"{verdict.message} ({_details('stream', error_type, error_code)})",
        billing=Billing.UNKNOWN if usage_told else verdict.billing,
        retryable=verdict.retryable,
    )


def of_transport(error: BaseException) -> ModelError:
    """The failure of a connection, by the deepest cause: adapters in between name some of them wrongly."""
    causes = list(_causes(error))
    if any(isinstance(cause, _BAD_ADDRESS) for cause in causes):
        return ModelError("the provider's address is no URL", billing=Billing.NOTHING, retryable=False)
    if any(isinstance(cause, aiohttp.ClientConnectorCertificateError) for cause in causes):
        return ModelError(
            "the provider's TLS certificate is not trusted here", billing=Billing.NOTHING, retryable=False
        )
    if any(isinstance(cause, _NEVER_CONNECTED) for cause in causes):
        return ModelError(
            "no connection to the provider could be made", billing=Billing.NOTHING, retryable=True
        )
    if any(map(_was_not_written, causes)):
        return ModelError(
            "the provider closed the connection before it had the request",
            billing=Billing.NOTHING,
            retryable=True,
        )
    return ModelError("the connection to the provider broke", billing=Billing.UNKNOWN, retryable=True)


def of_unfinished_stream() -> ModelError:
    """A stream that ended without saying so: what was generated is unknown."""
    return ModelError("the provider's reply ended early", billing=Billing.UNKNOWN, retryable=True)


def of_unreadable_reply(what: str) -> ModelError:
    """A reply that was served, and most likely billed, but cannot be used; `what` is a word of ours."""
    return ModelError(f"the provider's reply has no valid {what}", billing=Billing.UNKNOWN, retryable=False)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long the provider asks to wait, if it says so in any of the ways in use."""
    if (milliseconds := _amount(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1_000
    given = headers.get("retry-after")
    if (seconds := _amount(given)) is not None:
        return seconds
    try:
        # Against the provider's own clock; ours may be wrong.
        wait = parsedate_to_datetime(given or "") - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())


def _was_not_written(cause: BaseException) -> bool:
    """Whether the transport refused to write: of the body the provider has a part at most.

    The same class also says that a connection was lost behind a complete request, hence its words.
    """
    return isinstance(cause, aiohttp.ClientConnectionResetError) and "closing transport" in str(cause)


def _amount(text: str | None) -> float | None:
    try:
        amount = float(text or "")
    except ValueError:
        return None
    return amount if isfinite(amount) and amount >= 0 else None


def _is_spend_limit(error_code: object) -> bool:
    return isinstance(error_code, str) and error_code.endswith("spend_limit_reached")


def _details(where: str, error_type: object, error_code: object) -> str:
    """With the provider's most exact name for the error, if it can be nothing but a name."""
    named = (word for word in (error_code, error_type) if isinstance(word, str) and _NAME.match(word))
    return ", ".join((where, *islice(named, 1)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
