"""The metrics on an address of their own.

Not on the clients' port: they take no key, and even without tenants' ids their totals tell one tenant when
the others ask, how much, and of which models. Who may read them is decided by who reaches the address.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator.server.http.listening import Certificates, listening

Exposition = Callable[[], tuple[bytes, str]]
"""The metrics as text, and the media type of that."""


@asynccontextmanager
async def metrics_port(
    exposition: Exposition, *, host: str, port: int, certificates: Certificates | None = None
) -> AsyncIterator[int]:
    """Answer `GET /metrics` and nothing else, for the length of the block; gives the port's number.

    Args:
        exposition: Asked at each look.
        host: An address of this machine.
        port: 0 for any that is free.
        certificates: Those of the other ports; None for plain HTTP.

    Raises:
        InvalidRequestError: The address cannot be had, or the certificates cannot be read.
    """

    async def metrics(_request: Request) -> Response:
        content, media_type = exposition()
        return Response(content, headers={"content-type": media_type, "cache-control": "no-store"})

    app = Starlette(routes=[Route("/metrics", metrics)])
    app.router.redirect_slashes = False
    async with listening(app, host=host, port=port, certificates=certificates) as (_, bound):
        yield bound
