"""The way to a server: its address, TLS, and the key that goes with every call."""

import ipaddress
import re
from dataclasses import dataclass, field

import grpc
import grpc.aio

from orchestrator.errors import InvalidRequestError
from orchestrator.limits import MAX_MESSAGE_BYTES

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_KEY = re.compile(r"[\x21-\x7e]{1,500}")

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A connection that went away without a word (a laptop that slept, a firewall that forgot) is noticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # How long a client is called unreachable after a failure; the pauses are ours (`patience`).
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # gRPC's own retries would hide a failure that we are to tell of.
    ("grpc.enable_retries", 0),
)
_THIS_MACHINE = (("grpc.enable_http_proxy", 0),)
"""A proxy is not asked for what is here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """How the server is known, and what shows it who we are. PEM, all of it."""

    ca: bytes | None = None
    """Certificates that may have signed the server's; None for those of the system."""
    certificate: bytes | None = None
    """Ours, for a server that asks for one. With its chain."""
    private_key: bytes | None = field(default=None, repr=False)


def open_channel(address: str, tls: Tls | None, *, plaintext: bool) -> grpc.aio.Channel:
    """A channel, on which nothing has been sent yet. To be closed by the caller, on this event loop.

    Args:
        address: `HOST:PORT`, or `unix:PATH`.
        tls: None for none.
        plaintext: Send key and contexts unencrypted to another machine.

    Raises:
        InvalidRequestError: It is no address; or another machine's, and neither TLS nor plaintext was asked
            for; or certificate and key are not given together.
    """
    is_here = _is_this_machine(address)
    if tls is None:
        if not is_here and not plaintext:
            raise InvalidRequestError(
                f"{address} is another machine: without TLS anybody on the way could read the key"
                " (ask for TLS, or for plaintext where the way is safe)"
            )
        return grpc.aio.insecure_channel(address, options=(*_OPTIONS, *_THIS_MACHINE * is_here))
    if (tls.certificate is None) != (tls.private_key is None):
        raise InvalidRequestError("give the client's certificate and its key together")
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.private_key, tls.certificate)
    return grpc.aio.secure_channel(address, credentials, options=(*_OPTIONS, *_THIS_MACHINE * is_here))


def metadata_of(api_key: str) -> tuple[tuple[str, str], ...]:
    """What goes with every call.

    Raises:
        InvalidRequestError: It cannot be a key. The sentence does not hold it.
    """
    if not _KEY.fullmatch(api_key):
        raise InvalidRequestError("the API key is empty, or has characters that no key has")
    return (("authorization", f"Bearer {api_key}"),)


def _is_this_machine(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65_536:
        raise InvalidRequestError(f"{address[:200]!r} is no address like 127.0.0.1:7443 or unix:/path")
    host = match["v6"] or match["host"]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
