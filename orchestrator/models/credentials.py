"""The credentials of model providers: what they are called, where they belong, what can be one. Pure.

They travel as a mapping from the names that the environment gives them to their values, and only outside the
orchestrator: from its first moments, in `cli.start`, to the provider process (`models.provider`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from orchestrator.errors import KeyMissingError
from orchestrator.models.platforms import ANTHROPIC_URL, Bedrock, Foundry, Platform, Vertex

Credentials: TypeAlias = Mapping[str, str]

ANTHROPIC_KEY = "ANTHROPIC_API_KEY"
FOUNDRY_KEY = "ANTHROPIC_FOUNDRY_API_KEY"
BEDROCK_TOKEN = "AWS_BEARER_TOKEN_BEDROCK"  # noqa: S105 - the name of one, as the next
AWS_KEY_ID = "AWS_ACCESS_KEY_ID"
AWS_SECRET = "AWS_SECRET_ACCESS_KEY"  # noqa: S105
AWS_SESSION = "AWS_SESSION_TOKEN"
AWS_CONTAINER = "AWS_CONTAINER_AUTHORIZATION_TOKEN"

_USED = frozenset(
    {ANTHROPIC_KEY, FOUNDRY_KEY, BEDROCK_TOKEN, AWS_KEY_ID, AWS_SECRET, AWS_SESSION, AWS_CONTAINER}
)
_UNUSED = frozenset(
    {
        "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_CUSTOM_HEADERS",
        "ANTHROPIC_WEBHOOK_SIGNING_KEY",
        "AWS_SECURITY_TOKEN",
        "CLOUDSDK_AUTH_ACCESS_TOKEN",
    }
)
NAMES = _USED | _UNUSED
"""Variables that hold a credential of a model provider. Those that nothing here reads are among them: the
process that parses guests' messages has no use for them either."""

_LEAST_REMARKABLE_CHARS = 16
"""Shorter ones are placeholders for servers of one's own, and words of ordinary text."""


def of_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The credentials in an environment that something here could use."""
    return {name: environment[name] for name in sorted(_USED) if environment.get(name)}


def for_place(platform: Platform | None, base_url: str, given: Credentials) -> dict[str, str]:
    """Those of the credentials that are sent to a platform, or to the address of a server; each one clean.

    Raises:
        KeyMissingError: One is missing, or cannot be one. The sentence names it and never quotes it.
    """
    wanted = _wanted(platform)
    found = {name: checked(name, given[name]) for name in wanted if given.get(name)}
    if not found and platform is None and base_url == ANTHROPIC_URL:
        raise KeyMissingError(
            f"no key for the model provider: set {ANTHROPIC_KEY}, or name a server with --base-url"
        )
    if not found and isinstance(platform, Foundry):
        raise KeyMissingError(f"no key for the model provider: set {FOUNDRY_KEY}")
    if BEDROCK_TOKEN in found:
        # A token wins over keys, as in Amazon's own library.
        return {BEDROCK_TOKEN: found[BEDROCK_TOKEN]}
    if (AWS_KEY_ID in found) != (AWS_SECRET in found):
        raise KeyMissingError(f"{AWS_KEY_ID} and {AWS_SECRET} go together, and only one of them is set")
    return found


def with_credentials(platform: Platform, found: Credentials) -> Platform:
    """The platform as its client needs it."""
    match platform:
        case Bedrock():
            return replace(
                platform,
                bearer_token=found.get(BEDROCK_TOKEN, ""),
                access_key_id=found.get(AWS_KEY_ID, ""),
                secret_access_key=found.get(AWS_SECRET, ""),
                session_token=found.get(AWS_SESSION, ""),
            )
        case Foundry():
            return replace(platform, api_key=found.get(FOUNDRY_KEY, ""))
        case Vertex():
            return platform


def checked(name: str, value: str) -> str:
    """A credential without the white space around it, which a file or a shell's substitution leaves there.

    Raises:
        KeyMissingError: Nothing is left, or it has a character that would break an HTTP header or that
            betrays a slip of quoting.
    """
    secret = value.strip()
    if not secret:
        raise KeyMissingError(f"{name} is empty")
    for what, is_there in (
        (
            "a line break or another control character",
            any(ord(char) < 32 or char == "\x7f" for char in secret),
        ),
        ("a space", any(c.isspace() for c in secret)),
        ("a quotation mark or a backslash", any(c in "\"'`\\" for c in secret)),
        ("a character outside ASCII", not secret.isascii()),
    ):
        if is_there:
            raise KeyMissingError(f"{name} has {what} in it, which no key has: set it again")
    return secret


def remarkable(found: Credentials) -> tuple[bytes, ...]:
    """What must not be seen anywhere else: the credentials long enough to be nothing but credentials."""
    return tuple(value.encode() for value in found.values() if len(value) >= _LEAST_REMARKABLE_CHARS)


def _wanted(platform: Platform | None) -> tuple[str, ...]:
    match platform:
        case None:
            return (ANTHROPIC_KEY,)
        case Bedrock():
            return (BEDROCK_TOKEN, AWS_KEY_ID, AWS_SECRET, AWS_SESSION, AWS_CONTAINER)
        case Foundry():
            return (FOUNDRY_KEY,)
        case Vertex():
            return ()
