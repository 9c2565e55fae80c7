"""The options of every command that asks a server, and what they mean. Nothing heavy is imported here.

The options are written down once, in `_connection`; `connected` gives them to a command.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli import environment
from orchestrator.cli.shared_options import with_options
from orchestrator.errors import InvalidRequestError, UnauthenticatedError

DEFAULT_SERVER = "127.0.0.1:7443"
"""Where `rlm serve` listens unless told otherwise."""
MAX_FILE_BYTES = 1024 * 1024
"""Of a key or a certificate. More is another file, or a pipe without an end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM, as `orchestrator.client.Tls` takes it."""

    ca: bytes | None = None
    certificate: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """A server, and what opens it."""

    address: str
    api_key: str = field(repr=False)
    key_file: Path | None = None
    tls: TlsFiles | None = None
    plaintext: bool = False
    options: str = ""
    """Those that were given, to be typed again. The key is never among them."""


def _connection(
    *,
    server: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help=f"Of `rlm serve`, {DEFAULT_SERVER} for one on this machine."),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the API key; RLM_API_KEY unless given.")
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt; the system's certificates say who the server is.")
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Encrypt; these certificates (PEM) say so instead.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of this client, for a server that asks for one.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="Send the key unencrypted to another machine.")
    ] = False,
) -> None:
    """The options, for their signature."""


def _read(
    *,
    server: str,
    api_key_file: Path | None,
    tls: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    plaintext: bool,
) -> Connection:
    encrypted = tls or tls_ca is not None or tls_certificate is not None or tls_key is not None
    if encrypted and plaintext:
        raise typer.BadParameter("it contradicts the --tls options.", param_hint="'--plaintext'")
    if (tls_certificate is None) != (tls_key is None):
        raise typer.BadParameter("give the certificate and its key.", param_hint="'--tls-certificate'")
    again = {
        "--server": server,
        "--api-key-file": api_key_file,
        "--tls-ca": tls_ca,
        "--tls-certificate": tls_certificate,
        "--tls-key": tls_key,
    }
    words = [f"{name} {shlex.quote(str(value))}" for name, value in again.items() if value]
    words += ["--tls"] * (tls and not tls_ca) + ["--plaintext"] * plaintext
    return Connection(
        address=server or DEFAULT_SERVER,
        api_key=_key(api_key_file),
        key_file=api_key_file,
        tls=TlsFiles(
            ca=_content(tls_ca, "--tls-ca"),
            certificate=_content(tls_certificate, "--tls-certificate"),
            private_key=_content(tls_key, "--tls-key"),
        )
        if encrypted
        else None,
        plaintext=plaintext,
        options=" ".join(words),
    )


def _read_if_asked(*, server: str, **others: Any) -> Connection | None:
    if server:
        return _read(server=server, **others)
    for name, value in others.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter("it goes with --server.", param_hint=f"'{option}'")
    return None


def _key(file: Path | None) -> str:
    data = _content(file, "--api-key-file")
    key = environment.api_key() if data is None else data.decode("utf-8", "replace")
    if not key.strip():
        where = "RLM_API_KEY is not set" if data is None else f"--api-key-file {file} is empty"
        raise UnauthenticatedError(f"there is no API key: {where}; `rlm keys add` makes one")
    return key.strip()


def _content(file: Path | None, option: str) -> bytes | None:
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(f"cannot read {option} {file}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequestError(f"{option} {file} is too long for what it should be")
    return data


connected = with_options(_connection, _read, "connection")
"""A command with the options of a connection; without `--server` it asks the one on this machine."""
connectable = with_options(_connection, _read_if_asked, "connection")
"""A command that has a connection with `--server`, and None without."""
