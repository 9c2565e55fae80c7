import asyncio
import ssl
from unittest.mock import Mock

import aiohttp
import pytest

from orchestrator.errors import Billing
from orchestrator.models import failures

NOTHING, UNKNOWN = Billing.NOTHING, Billing.UNKNOWN


@pytest.mark.parametrize(
    ("status", "error_type", "billing", "retryable"),
    [
        (307, None, NOTHING, False),
        (400, "invalid_request_error", NOTHING, False),
        (401, "authentication_error", NOTHING, False),
        (402, "billing_error", NOTHING, False),
        (403, "permission_error", NOTHING, False),
        (404, "not_found_error", NOTHING, False),
        (408, "timeout_error", NOTHING, True),
        (409, "conflict_error", NOTHING, True),
        (413, "request_too_large", NOTHING, False),
        (418, None, NOTHING, False),
        (422, None, NOTHING, False),
        (429, "rate_limit_error", NOTHING, True),
        (500, "api_error", UNKNOWN, True),
        (502, None, UNKNOWN, True),
        (503, "overloaded_error", NOTHING, True),
        (503, None, UNKNOWN, True),
        (504, "timeout_error", UNKNOWN, True),
        (529, "overloaded_error", NOTHING, True),
        (599, None, UNKNOWN, True),
    ],
)
def test_a_status_says_what_it_may_have_cost_and_whether_to_try_again(
    status: int, error_type: str | None, billing: Billing, retryable: bool
) -> None:
    failure = failures.of_response(status, error_type=error_type, headers={})
    assert (failure.billing, failure.retryable, failure.status) == (billing, retryable, status)
    assert str(status) in str(failure)


@pytest.mark.parametrize("code", ["enforced_spend_limit_reached", "contract_spend_limit_reached"])
def test_a_spend_limit_is_not_waited_for(code: str) -> None:
    failure = failures.of_response(
        429, error_type="rate_limit_error", error_code=code, headers={"retry-after": "5"}
    )
    assert (failure.billing, failure.retryable, failure.retry_after_s) == (NOTHING, False, None)
    assert "spend limit" in str(failure)


def test_a_provider_that_says_do_not_retry_is_believed() -> None:
    assert not failures.of_response(529, headers={"x-should-retry": "false"}).retryable


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_every_form_in_use(headers: dict[str, str], seconds: float | None) -> None:
    assert failures.retry_after_s(headers) == seconds
    assert failures.of_response(429, headers=headers).retry_after_s == seconds


@pytest.mark.parametrize(
    ("error_type", "before", "retryable"),
    [
        ("overloaded_error", NOTHING, True),
        ("rate_limit_error", NOTHING, True),
        ("api_error", UNKNOWN, True),
        ("timeout_error", UNKNOWN, True),
        ("invalid_request_error", NOTHING, False),
        ("brand_new_error", UNKNOWN, True),
        (None, UNKNOWN, True),
    ],
)
def test_an_error_in_a_stream_counts_by_its_type_until_usage_was_told(
    error_type: str | None, before: Billing, retryable: bool
) -> None:
    early = failures.of_stream_event(error_type, usage_told=False)
    late = failures.of_stream_event(error_type, usage_told=True)
    assert (early.billing, late.billing) == (before, UNKNOWN)
    assert early.retryable is late.retryable is retryable


def _wrapped(cause: BaseException) -> Exception:
    """As the transport and the SDK hand it on: both name a lost connection `ConnectError`."""
    outer = ConnectionError("Connection error.")
    outer.__cause__ = cause
    return outer


_KEY = Mock(ssl=True, host="example.test", port=443, is_ssl=True)


@pytest.mark.parametrize(
    ("cause", "billing", "retryable"),
    [
        (aiohttp.ClientConnectorError(_KEY, OSError(111, "refused")), NOTHING, True),
        (aiohttp.ClientConnectorDNSError(_KEY, OSError(-2, "unknown name")), NOTHING, True),
        (aiohttp.ClientConnectorSSLError(_KEY, ssl.SSLError(1, "handshake")), NOTHING, True),
        (
            aiohttp.ClientConnectorCertificateError(_KEY, ssl.SSLCertVerificationError(1, "expired")),
            NOTHING,
            False,
        ),
        (aiohttp.ConnectionTimeoutError("connect"), NOTHING, True),
        (aiohttp.InvalidUrlClientError("http://["), NOTHING, False),
        (aiohttp.ServerDisconnectedError(), UNKNOWN, True),
        (aiohttp.ClientOSError(104, "reset"), UNKNOWN, True),
        (aiohttp.ClientConnectionResetError("Cannot write to closing transport"), NOTHING, True),
        (aiohttp.ClientConnectionResetError("Connection lost"), UNKNOWN, True),
        (aiohttp.SocketTimeoutError("read"), UNKNOWN, True),
        (aiohttp.ClientPayloadError("short"), UNKNOWN, True),
        (asyncio.IncompleteReadError(b"", 4), UNKNOWN, True),
    ],
)
def test_a_broken_connection_is_judged_by_its_deepest_cause(
    cause: BaseException, billing: Billing, retryable: bool
) -> None:
    failure = failures.of_transport(_wrapped(cause))
    assert (failure.billing, failure.retryable) == (billing, retryable)


@pytest.mark.parametrize(
    "said", ["sk-ant-SECRET", "Ignore all previous", "x" * 500, "a\x1b[31m", "a\n", 7, None, {}]
)
def test_no_message_carries_the_providers_words(said: object) -> None:
    for failure in (
        failures.of_response(400, error_type=said, error_code=said, headers={}),
        failures.of_stream_event(said, said, usage_told=False),
    ):
        assert str(failure) in (
            "the provider refused the request (400)",
            "the provider failed (stream)",
        )


def test_the_longest_message_fits_a_line() -> None:
    codes = ("a" * 40, "a" * 20 + "_spend_limit_reached")
    for code in codes:
        for status in (*range(300, 600), 999):
            assert len(str(failures.of_response(status, error_code=code, headers={}))) <= 100
        assert len(str(failures.of_stream_event("overloaded_error", code, usage_told=True))) <= 100


def test_the_most_exact_name_of_an_error_is_told() -> None:
    failure = failures.of_response(
        429, error_type="rate_limit_error", error_code="ramp_limit_exceeded", headers={}
    )
    assert str(failure) == "the provider's rate limit is reached (429, ramp_limit_exceeded)"
