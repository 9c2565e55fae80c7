"""Provider processes for tests: real ones, asked to send to a fake provider, and none."""

import os
from typing import Self

from orchestrator.models.platforms import Platform
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.provider.sealed import SealedCredentials

KEY = "sk-ant-test-0123456789-canary"


def provider_at(
    url: str, key: str = KEY, *, platform: Platform | None = None, **credentials: str
) -> ProviderProcess:
    """A process that has the key and sends to the address; close it."""
    given = {**({"ANTHROPIC_API_KEY": key} if key else {}), **credentials}
    return ProviderProcess(SealedCredentials.of(given), base_url=url, platform=platform)


class NoProcess:
    """Stands in for the process where nobody asks it anything; it would cost each test a second."""

    def __init__(self, credentials: SealedCredentials, **told: object) -> None:
        os.close(credentials.take())
        self.told = told
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
