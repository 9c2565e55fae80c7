"""The HTTP side of the service: every route of the tables, behind a key, under its limits.

What no key is asked for: whether the server is alive and ready, and its OpenAPI document; its metrics are not
here (`server.metrics_port`). There are no cookies, and no page of another origin is let in (CORS is off).
"""

import asyncio
import logging
import re
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any, get_origin

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator import errors
from orchestrator.limits import (
    HTTP_ANSWER_S,
    MAX_HTTP_HEADER_BYTES,
    MAX_HTTP_REQUESTS_OF_TENANT,
    MAX_MESSAGES_BODY_BYTES,
)
from orchestrator.server.http import admin as admin_resources
from orchestrator.server.http import messages, resources
from orchestrator.server.http.forms import query_values
from orchestrator.server.http.openapi import document
from orchestrator.server.http.refusals import RequestRefusedError, body_of, refused, told
from orchestrator.server.http.requests import HeldRoom, Room, first_fault, key_of, let_in, linger, read_json
from orchestrator.server.http.routes import AdminCall, Asked, Call, Route
from orchestrator.service.admin_port import Admin
from orchestrator.service.port import Office

_log = logging.getLogger(__name__)

ROUTES: tuple[Route, ...] = (*resources.ROUTES, *messages.ROUTES)
"""All that takes a key."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What can be the id of anything, or a hash. A database must not see more than that of a path."""
_HEADERS = (
    # What a model or a guest wrote is served from here; no browser is to make anything of it.
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; sandbox"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _House:
    """What all routes of one app share."""

    office: Office
    admin: Admin | None
    room: Room
    under_way: Counter[str]

    @contextmanager
    def counted(self, of: str) -> Iterator[None]:
        """One more request of a tenant, or of all operators together, unless it has too many."""
        if self.under_way[of] >= MAX_HTTP_REQUESTS_OF_TENANT:
            raise RequestRefusedError(429, "rate_limit_error", "there are too many requests at once")
        self.under_way[of] += 1
        try:
            yield
        finally:
            self.under_way[of] -= 1
            # Else everybody who ever asked would stay here.
            if not self.under_way[of]:
                del self.under_way[of]


def make_app(
    office: Office,
    is_ready: Callable[[], bool],
    *,
    routes: Sequence[Route] = ROUTES,
    admin: Admin | None = None,
    why_not: Callable[[], Sequence[str]] = tuple,
) -> Starlette:
    """The application.

    Args:
        office: What is asked.
        is_ready: Whether new runs are taken.
        routes: All that takes a tenant's key.
        admin: Is asked about tenants and keys; None to have no such routes.
        why_not: What keeps the server from being ready, a sentence each that anybody may read.
    """
    house = _House(office=office, admin=admin, room=Room(), under_way=Counter())
    if admin is not None:
        routes = (*routes, *admin_resources.ROUTES)
    openapi = document(routes, version("rlm-orchestrator"))

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(_request: Request) -> Response:
        if is_ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "because": list(why_not())}, 503)

    async def openapi_json(_request: Request) -> Response:
        return JSONResponse(openapi)

    app = Starlette(
        routes=[
            *(_route(route, house) for route in routes),
            StarletteRoute("/healthz", healthz),
            StarletteRoute("/readyz", readyz),
            StarletteRoute("/openapi.json", openapi_json),
        ],
        middleware=[Middleware(_Guard)],
        exception_handlers={HTTPException: _no_such_route},
    )
    # Else Starlette would send whoever adds a slash, key and all, to whatever host his request named.
    app.router.redirect_slashes = False
    return app


def _route(route: Route, house: _House) -> StarletteRoute:
    made = StarletteRoute(route.path, _Endpoint(route, house), methods=[route.method], name=route.name)
    # Starlette answers HEAD wherever it answers GET, by doing the work of GET: here that would be a stream.
    made.methods = {route.method}
    return made


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """One route: from the request to the last byte of the response."""

    route: Route
    house: _House

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            response = await self._answer(Request(scope, receive, send), held)
            await response(scope, receive, send)

    async def _answer(self, request: Request, held: ExitStack) -> Response:
        house, route = self.house, self.route
        try:
            # Who asks comes before what is asked: a stranger's body is not even parsed.
            async with asyncio.timeout(HTTP_ANSWER_S):
                visitor = await _enter(route, house, key_of(request.headers))
            held.enter_context(house.counted(visitor.counts_as))
            let_in(request)
            asked = await _let_in(route, request, held.enter_context(house.room.hold()))
            async with asyncio.timeout(route.answer_s):
                return await visitor.answered(asked)
        except ClientDisconnect:
            # Nobody reads this.
            return Response(status_code=499)
        except Exception as error:
            return await _refusal(route, request, error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Visitor:
    """Somebody whose key is known, at the route that he asked for."""

    counts_as: str
    answered: Callable[[Asked], Awaitable[Response]]


async def _enter(route: Route, house: _House, key: str | None) -> _Visitor:
    """Who asks.

    Raises:
        UnauthenticatedError: Nobody that is known.
    """
    answer, administer, admin = route.answer, route.administer, house.admin
    if answer is not None:
        caller = await house.office.authenticate(key)
        return _Visitor(
            counts_as=caller.tenant.tenant_id,
            answered=lambda asked: answer(Call(**_parts(asked), office=house.office, caller=caller)),
        )
    if administer is None or admin is None:
        raise errors.InvariantError(f"nobody answers {route.name}")
    who = await admin.authenticate(key)
    return _Visitor(
        counts_as=_OPERATORS if who.tenant is None else who.tenant.tenant_id,
        answered=lambda asked: administer(AdminCall(**_parts(asked), admin=admin, who=who)),
    )


_OPERATORS = ""
"""No tenant's id."""


def _parts(asked: Asked) -> dict[str, Any]:
    """What was asked, to be answered from: the body moves, since it may be long and is not kept twice."""
    parts = {item.name: getattr(asked, item.name) for item in fields(Asked)}
    asked.body = None
    return parts


async def _let_in(route: Route, request: Request, held: HeldRoom) -> Asked:
    if not all(_NAME.fullmatch(part) for part in request.path_params.values()):
        raise errors.NotFoundError("no id looks like that")
    known = route.query.model_fields.items()
    lists = frozenset(name for name, about in known if get_origin(about.annotation) is list)
    try:
        query = route.query.model_validate(query_values(request.query_params.multi_items(), lists))
    except ValidationError as error:
        raise errors.InvalidRequestError(first_fault(error)) from None
    body = None
    if route.body is not None:
        body = await read_json(request, route.body, max_bytes=route.max_body_bytes, room=held)
    return Asked(request=request, body=body, query=query, room=held)


async def _refusal(route: Route, request: Request, error: Exception) -> Response:
    if not isinstance(error, errors.CallerError | RequestRefusedError):
        # Its kind and place, not its words: another library's may hold what somebody sent.
        place = "".join(traceback.format_tb(error.__traceback__))
        _log.error("%s failed: %s\n%s", route.name, type(error).__name__, place)
    if route.body is not None or route.takes_bytes:
        await linger(request, max_bytes=MAX_MESSAGES_BODY_BYTES)
    return refused(error, unavailable=route.unavailable, absent=route.absent)


async def _no_such_route(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    if status == 405:
        refusal = RequestRefusedError(405, "invalid_request_error", "this path is not for that method")
    else:
        refusal = RequestRefusedError(404, "not_found_error", "there is no such path")
    return JSONResponse(body_of(*told(refusal)), status, headers=headers)


class _Guard:
    """What holds for every request and every response, known paths or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        app = self._app if _size_of_head(scope) <= MAX_HTTP_HEADER_BYTES else refused(_TOO_MUCH)
        await app(scope, receive, with_headers)


_TOO_MUCH = RequestRefusedError(431, "request_too_large", "the headers are too long")


def _size_of_head(scope: Scope) -> int:
    # The parser's own limit is for headers that are not complete yet: a long one that comes at once passes.
    headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return headers + len(scope["raw_path"]) + len(scope["query_string"])
