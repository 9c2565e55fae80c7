"""Where a page ends, in a form that a client can only give back.

It is no secret and grants nothing: a page is always one of the caller's own tenant.
"""

import base64
import binascii
import re

from orchestrator.errors import InvalidRequestError

_FORM = re.compile(r"(\d{1,12}\.\d{1,9}) ([A-Za-z0-9_-]{1,64})")


def token(at: float, name: str) -> str:
    """For the page behind this one, which is the last of its page."""
    return base64.urlsafe_b64encode(f"{at:.9f} {name}".encode()).decode().rstrip("=")


def read(given: str | None) -> tuple[float, str] | None:
    """What a token says; None without one.

    Raises:
        InvalidRequestError: We made no such token.
    """
    if not given:
        return None
    try:
        text = base64.b64decode(given + "=" * (-len(given) % 4), altchars=b"-_", validate=True)
        found = _FORM.fullmatch(text.decode("ascii"))
    except (binascii.Error, ValueError):
        found = None
    if found is None:
        raise InvalidRequestError("page_token is none that a page came with")
    return float(found[1]), found[2]
