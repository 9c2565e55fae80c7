"""API keys: how one is made, and the hash of which it is known."""

import hashlib
import secrets
import string

HINT_CHARS = 4
_CHARS = string.digits + string.ascii_letters
_LENGTH = 40


def new_key(prefix: str) -> str:
    """The prefix and 238 random bits."""
    return prefix + "".join(secrets.choice(_CHARS) for _ in range(_LENGTH))


def could_be_key(key: str, prefix: str) -> bool:
    """Whether `new_key` could have made it. What a stranger makes up without looking costs no look-up."""
    random = key.removeprefix(prefix)
    return len(key) == len(prefix) + _LENGTH == len(prefix) + len(random) and not random.strip(_CHARS)


def hash_of(key: str) -> bytes:
    """What is stored of a key.

    A plain hash is enough: a key is 238 random bits, and not a password that could be guessed. So a look-up
    is one index probe, and how long that takes tells of the hash, not of the key.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
