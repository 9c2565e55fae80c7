"""The provider process of a command: started before the heavy imports, having a second's of its own."""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

from orchestrator.config import Settings
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.provider.sealed import SealedCredentials


@contextmanager
def started(settings: Settings, base_url: str = "") -> Iterator[ProviderProcess]:
    """The process, for the length of the block.

    Args:
        settings: The process's settings.
        base_url: Where calls go; empty for the public address of Anthropic or the platform.

    Raises:
        InvalidRequestError: The environment has an odd idea of where the credentials are.
    """
    with (
        closing(SealedCredentials.handed_over(os.environ)) as sealed,
        ProviderProcess(
            sealed,
            base_url=base_url,
            platform=settings.platform,
            environment=settings.provider_environment,
        ) as process,
    ):
        yield process


@contextmanager
def started_for(models: Iterable[str], settings: Settings, base_url: str) -> Iterator[ProviderProcess | None]:
    """As `started`, or None if all of the models, as the command names them, are scripted ones."""
    if all(name.startswith(SCRIPTED_PREFIX) for name in (*models, *settings.models_allowed)):
        # Nobody's, then.
        SealedCredentials.handed_over(os.environ).close()
        yield None
        return
    with started(settings, base_url) as process:
        yield process
