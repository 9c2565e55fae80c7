"""Which of the environment's variables the provider process has. Pure.

A list of what is needed, not of what is forbidden: an address, a header or a proxy that the environment sets
for other programs must not steer where prompts go, and what is not there cannot. The two libraries that look
for credentials themselves, Amazon's and Google's, are given their own variables, and proxies, which they use
for that alone.
"""

from collections.abc import Mapping

from orchestrator.models.credentials import NAMES
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex

_ALWAYS = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
)
"""PATH: a profile of Amazon's may name a program that prints credentials."""
_OF_LIBRARIES = frozenset(
    {"ALL_PROXY", "CURL_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE"}
)
_PREFIXES: Mapping[type, tuple[str, ...]] = {
    Bedrock: ("AWS_",),
    Vertex: ("CLOUDSDK_", "GCE_", "GOOGLE_"),
    Foundry: (),
}


def environment_for(platform: Platform | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that the provider process gets. It has no credential in it."""
    prefixes = _PREFIXES[type(platform)] if platform is not None else ()
    return {name: value for name, value in environment.items() if _is_needed(name, prefixes)}


def _is_needed(name: str, prefixes: tuple[str, ...]) -> bool:
    if name in NAMES:
        return False
    # Proxies are written in small letters too.
    return name in _ALWAYS or (
        bool(prefixes) and (name.startswith(prefixes) or name.upper() in _OF_LIBRARIES)
    )
