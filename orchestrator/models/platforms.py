"""Where Anthropic's models are served besides Anthropic's own address, and what a client there needs.

Plain values. `config` makes them from the environment, without any credential; the provider process adds
those (`credentials.with_credentials`). What the SDK does with them is in `sdk`.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TypeAlias
from urllib.parse import urlsplit

from orchestrator.errors import InvalidRequestError, MachineError

ANTHROPIC_URL = "https://api.anthropic.com"

_MULTI_REGION_VERTEX = ("us", "eu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bedrock:
    """Amazon Bedrock. Models have names of their own there, such as `us.anthropic.claude-...-v1:0`."""

    region: str
    bearer_token: str = field(default="", repr=False)
    """A Bedrock API key. Without one, requests are signed with the keys below."""
    access_key_id: str = ""
    """Without one either, Amazon's own library looks for credentials: profile, container, instance."""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    profile: str = ""

    @property
    def url(self) -> str:
        """The region's address."""
        return f"https://bedrock-runtime.{self.region}.amazonaws.com"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vertex:
    """Google Cloud's Vertex AI. Dated models are written with an `@` there: `claude-haiku-4-5@20251001`."""

    region: str
    """`global`, `us`, `eu`, or one region."""
    project_id: str
    access_token: str = field(default="", repr=False)
    """Without one, Google's own library looks for the application default credentials."""

    @property
    def url(self) -> str:
        """The region's address."""
        if self.region == "global":
            return "https://aiplatform.googleapis.com/v1"
        if self.region in _MULTI_REGION_VERTEX:
            return f"https://aiplatform.{self.region}.rep.googleapis.com/v1"
        return f"https://{self.region}-aiplatform.googleapis.com/v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Foundry:
    """Microsoft Foundry. A model's name is that of its deployment there."""

    resource: str
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The resource's address."""
        return f"https://{self.resource}.services.ai.azure.com/anthropic/"


Platform: TypeAlias = Bedrock | Vertex | Foundry


def check_url(url: str) -> None:
    """Of a server, or of a proxy.

    Raises:
        InvalidRequestError: It is no http or https URL.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        # Not quoted: it may hold a password.
        raise InvalidRequestError("the model provider's address, or the proxy's, is no http or https URL")


def check_installed(platform: Platform) -> None:
    """Whether the platform's own library is there.

    Raises:
        MachineError: It is not.
    """
    match platform:
        case Bedrock():
            # With a bearer token too: it reads the streams.
            _need("boto3", "bedrock")
        case Vertex() if not platform.access_token:
            _need("google.auth", "vertex")


def _need(module: str, extra: str) -> None:
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise MachineError(f"{module} is not installed: pip install 'rlm-orchestrator[{extra}]'")
