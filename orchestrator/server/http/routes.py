"""What a route is: one declaration, from which come the route itself, its checks and its place in OpenAPI."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from orchestrator import errors
from orchestrator.limits import HTTP_ANSWER_S, MAX_HTTP_BODY_BYTES
from orchestrator.server.http.forms import NoQuery
from orchestrator.server.http.refusals import NO_RUN
from orchestrator.server.http.requests import HeldRoom
from orchestrator.service.admin_port import NEEDED as ADMIN_NEEDED
from orchestrator.service.admin_port import Admin, Administrator, Need
from orchestrator.service.port import Caller, Office
from orchestrator.service.rules import NEEDED
from orchestrator.store.books import Role

Model = TypeVar("Model", bound=BaseModel)


@dataclass(kw_only=True, slots=True)
class Asked:
    """One request that was let in."""

    request: Request
    body: BaseModel | None
    query: BaseModel
    room: HeldRoom
    """What its body takes; given back at its end, or before."""

    def take_body(self, form: type[Model]) -> Model:
        """The body, of the form that its route declares. Once: it may be long, and is not kept here."""
        body, self.body = self.body, None
        if not isinstance(body, form):
            raise errors.InvariantError(f"the route declares no body {form.__name__}")
        return body

    def query_as(self, form: type[Model]) -> Model:
        """The query, of the form that its route declares."""
        if not isinstance(self.query, form):
            raise errors.InvariantError(f"the route declares no query {form.__name__}")
        return self.query

    def named(self, name: str) -> str:
        """A part of the path."""
        part = self.request.path_params[name]
        if not isinstance(part, str):
            raise errors.InvariantError("a part of a path is text")
        return part


@dataclass(kw_only=True, slots=True)
class Call(Asked):
    """One of a tenant's, about what is its own."""

    office: Office
    caller: Caller


@dataclass(kw_only=True, slots=True)
class AdminCall(Asked):
    """One about tenants and keys."""

    admin: Admin
    who: Administrator


Answer = Callable[[Call], Awaitable[Response]]
AdminAnswer = Callable[[AdminCall], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What can be asked over HTTP."""

    name: str
    """Its own, and of the rpc of run.proto or admin.proto that says what is promised ..."""
    rpc: str = ""
    """... unless that has another name."""
    method: str
    path: str
    summary: str
    answer: Answer | None = None
    """Either this ..."""
    administer: AdminAnswer | None = None
    """... or, for what admin.proto says, this."""
    body: type[BaseModel] | None = None
    max_body_bytes: int = MAX_HTTP_BODY_BYTES
    """Of a JSON body."""
    query: type[BaseModel] = NoQuery
    reply: type[BaseModel] | None = None
    media_type: str = "application/json"
    """Of the reply."""
    takes_bytes: bool = False
    """The body is no JSON: bytes as they come."""
    status: int = 200
    refusals: Sequence[type[errors.OrchestratorError]] = ()
    """Besides those that every route has."""
    answer_s: float | None = HTTP_ANSWER_S
    """None for what takes as long as it takes."""
    unavailable: int = 503
    """Told while the server drains or its database does not answer."""
    absent: str = NO_RUN
    """Told of what is not there, and of what is another's."""

    @property
    def role(self) -> Role:
        """What the key must at least be; the office checks. Of a route that administers nothing."""
        return NEEDED[self.rpc or self.name]

    @property
    def needs(self) -> str:
        """Which key, in a sentence."""
        if self.administer is None:
            return f"Needs the role {self.role.value}."
        if ADMIN_NEEDED[self.rpc or self.name] is Need.OPERATOR:
            return "Needs an operator's key."
        return "Needs an operator's key, or one of the tenant with the role admin."
