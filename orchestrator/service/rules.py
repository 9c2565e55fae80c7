"""What a caller may do, and how a run that is asked for is decided. Pure.

Rules:

1. Each method needs a role; a role may do what those below it may. A method without a row here is refused.
2. A limit that is not asked for is the default of `RunLimits`. The tenant's maximum counts where it is less
   than either; a default that the server can't have, a depth, is lowered to what it can.
3. A tenant's list of models counts for every model a run names, in any role and under any alias. Of those
   that cells may name only because the server lists them, the others are left out.
4. A scripted model is a program of this server's machine: nobody names one but those very files that the
   operator's own settings name.
5. A runtime must be one that the server offers and the tenant may have. None asked for: the first that the
   server offers and the tenant may have.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase

from orchestrator.conversation import Dialect
from orchestrator.errors import InvalidRequestError, NotAllowedError
from orchestrator.limits import RunLimits
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.sandbox.runtimes import EVERYBODY, GVISOR, RUNTIMES
from orchestrator.store.books import Role, TenantRow, TenantRules

NEEDED: Mapping[str, Role] = {
    "CreateRun": Role.RUN,
    "GetRun": Role.READ,
    "ListRuns": Role.READ,
    "WatchRun": Role.READ,
    "ReadText": Role.READ,
    "CancelRun": Role.RUN,
    "DeleteRun": Role.ADMIN,
    "ResumeRun": Role.RUN,
    "ContinueRun": Role.RUN,
    "StartUpload": Role.RUN,
    "Upload": Role.RUN,
    "ListContexts": Role.READ,
    "DeleteContext": Role.ADMIN,
    "GetUsage": Role.READ,
}
_RANK = {role: rank for rank, role in enumerate((Role.READ, Role.RUN, Role.ADMIN))}

MAX_QUESTION_BYTES = 1_000_000
MAX_KEY_CHARS = 100
MAX_NAME_BYTES = 255
MAX_ALLOWED_MODELS = 20
MAX_MODEL_NAME_CHARS = 200

_OUTCOME = re.compile(r"[a-z_]{1,40}")
_MOST_OUTCOMES = 20
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MOST = 1_000_000_000_000
"""Of anything counted, as on the command line."""
_COUNTS: Mapping[str, tuple[int, int]] = {
    "max_tokens": (1, _MOST),
    "max_cost_microusd": (1, _MOST),
    "max_calls": (1, _MOST),
    "max_child_runs": (0, _MOST),
    "max_depth": (0, 100),
    "max_turns": (1, 10_000),
    "max_concurrency": (1, 10_000),
}
"""Least and most."""
_SECONDS = ("deadline_s", "cell_timeout_s")
_MOST_S = 30 * 86_400.0
_TEXTS = ("model", "sub_model", "runtime", "dialect")
_NAMES = {*_COUNTS, *_SECONDS, *_TEXTS, "allow_models", "memoise"}


def check_role(method: str, role: Role) -> None:
    """Raise unless the role may call the method.

    Raises:
        NotAllowedError: It may not.
    """
    needed = NEEDED[method]
    if _RANK[role] < _RANK[needed]:
        raise NotAllowedError(f"{method} needs a key with the role {needed.value}; this one has {role.value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What the server has to offer, whoever asks."""

    model: str
    """Of root runs, unless asked for."""
    sub_model: str
    """Of sub-calls and child runs, where neither it nor `model` is asked for."""
    models_allowed: Sequence[str]
    """Empty for all."""
    runtimes: Sequence[str]
    """The first is the one for those who don't ask."""
    max_sandboxes: int
    held_to_gvisor: frozenset[str] = frozenset()
    """Ids of tenants, or `*` (RLM_RUNSC_TENANTS): see `sandbox.runtimes`."""

    @property
    def scripted(self) -> frozenset[str]:
        """The scripted models that the operator names, and so trusts."""
        named = {self.model, self.sub_model, *self.models_allowed}
        return frozenset(name for name in named if name.startswith(SCRIPTED_PREFIX))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """How a run will be answered: what was asked for, the defaults, and the tenant's maxima."""

    model: str
    sub_model: str
    allow_models: tuple[str, ...]
    runtime: str
    dialect: Dialect
    memoise: bool
    limits: RunLimits

    def as_options(self) -> dict[str, object]:
        """As `RunOptions` of run.proto, by field name."""
        limits = asdict(self.limits)
        return {
            "model": self.model,
            "sub_model": self.sub_model,
            "allow_models": list(self.allow_models),
            "runtime": self.runtime,
            "dialect": self.dialect.value,
            "memoise": self.memoise,
            **{name: limits[name] for name in (*_COUNTS, *_SECONDS)},
        }


def decide(options: Mapping[str, object], tenant: TenantRow, offer: Offer) -> Decided:
    """How a run with these options will be answered. What is decided once is decided again the same way,
    unless the tenant's rules or the offer have narrowed since.

    Raises:
        InvalidRequestError: An option makes no sense.
        NotAllowedError: A model or runtime that the tenant may not have.
    """
    rules = tenant.rules
    unknown = sorted(options.keys() - _NAMES)
    if unknown:
        raise InvalidRequestError(f"unknown options: {', '.join(unknown)[:200]}")
    model = _text(options, "model")
    sub_model = _text(options, "sub_model") or model or offer.sub_model
    allow = _models(options.get("allow_models", ()))
    decided = Decided(
        model=model or offer.model,
        sub_model=sub_model,
        allow_models=allow,
        runtime=_runtime(_text(options, "runtime"), tenant, offer),
        dialect=_dialect(_text(options, "dialect")),
        memoise=_flag(options, "memoise"),
        limits=_limits(options, rules, offer),
    )
    for named in (decided.model, sub_model, *allow):
        _check_scripted(named, offer.scripted)
    return decided


def permits(model: str, rules: TenantRules, offer: Offer) -> bool:
    """Whether a tenant may use a model, by its own name and not by an alias."""
    if model.startswith(SCRIPTED_PREFIX):
        return model in offer.scripted
    return not rules.models or any(fnmatchcase(model, pattern) for pattern in rules.models)


def check_models(models: Collection[str], rules: TenantRules, offer: Offer) -> None:
    """Raise unless the tenant may use all of these models, by their own names.

    Raises:
        NotAllowedError: It may not use one.
    """
    for model in models:
        if not permits(model, rules, offer):
            raise NotAllowedError(f"you may not use the model {model[:100]!r}")


def check_question(question: str) -> None:
    """Raise unless it is one.

    Raises:
        InvalidRequestError: It is empty or too long.
    """
    if not question.strip():
        raise InvalidRequestError("the question is empty")
    if _LONE_SURROGATE.search(question):
        raise InvalidRequestError("the question is no Unicode text")
    if len(question.encode("utf-8", "surrogatepass")) > MAX_QUESTION_BYTES:
        raise InvalidRequestError(f"the question is longer than {MAX_QUESTION_BYTES:,} bytes")


def check_outcomes(outcomes: Collection[str]) -> None:
    """Raise unless these can be outcomes to look for. What none can be does not get as far as the database.

    Raises:
        InvalidRequestError: They are too many, or one is no such word.
    """
    if len(outcomes) > _MOST_OUTCOMES or not all(map(_OUTCOME.fullmatch, outcomes)):
        raise InvalidRequestError(f"outcomes must be at most {_MOST_OUTCOMES} words such as answered")


def check_idempotency_key(key: str) -> None:
    """Raise unless it can be one.

    Raises:
        InvalidRequestError: It is empty, too long, or holds what can't be shown.
    """
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise InvalidRequestError(f"idempotency_key must have 1 to {MAX_KEY_CHARS} printable characters")


def _limits(options: Mapping[str, object], rules: TenantRules, offer: Offer) -> RunLimits:
    defaults = RunLimits()
    given: dict[str, float] = {}
    for name, (least, most) in _COUNTS.items():
        default = getattr(defaults, name)
        if name == "max_depth":
            default = min(default, offer.max_sandboxes - 1)
        given[name] = _count(options.get(name), name, default, least=least, most=most)
    for name in _SECONDS:
        given[name] = _seconds(options.get(name), name, getattr(defaults, name))
    if given["max_depth"] >= offer.max_sandboxes:
        raise InvalidRequestError(
            f"max_depth {given['max_depth']} needs a chain of {given['max_depth'] + 1} sandboxes, and this"
            f" server has {offer.max_sandboxes}"
        )
    # The other two clocks of a cell must not undercut the one that was asked for.
    given["cell_cpu_s"] = max(defaults.cell_cpu_s, given["cell_timeout_s"])
    given["cell_ceiling_s"] = max(defaults.cell_ceiling_s, given["cell_timeout_s"])
    return _within(replace(defaults, **given), _maxima(rules))  # type: ignore[arg-type] # whole by `_count`


def _maxima(rules: TenantRules) -> Mapping[str, float]:
    """The tenant's; no chain of its runs is longer than what it may have of sandboxes."""
    if rules.max_concurrent_sandboxes is None:
        return rules.max_limits
    deepest = rules.max_concurrent_sandboxes - 1
    return {**rules.max_limits, "max_depth": min(deepest, rules.max_limits.get("max_depth", deepest))}


def _within(limits: RunLimits, most: Mapping[str, float]) -> RunLimits:
    lowered = {}
    for item in fields(limits):
        value = getattr(limits, item.name)
        if item.name in most and most[item.name] < value:
            lowered[item.name] = type(value)(most[item.name])
    return replace(limits, **lowered)


def _count(value: object, name: str, default: int, *, least: int, most: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidRequestError(f"{name} must be a whole number from {least:,} to {most:,}")
    return value


def _seconds(value: object, name: str, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a number of seconds")
    if not 0 < value <= _MOST_S:
        raise InvalidRequestError(f"{name} must be more than 0 and at most {_MOST_S:,.0f} seconds")
    return float(value)


def _text(options: Mapping[str, object], name: str) -> str:
    value = options.get(name, "")
    if not isinstance(value, str) or len(value) > MAX_MODEL_NAME_CHARS or not value.isprintable():
        raise InvalidRequestError(f"{name} must be a name of at most {MAX_MODEL_NAME_CHARS} characters")
    return value


def _flag(options: Mapping[str, object], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be true or false")
    return value


def _models(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidRequestError("allow_models must be a list")
    if len(value) > MAX_ALLOWED_MODELS:
        raise InvalidRequestError(f"allow_models has more than {MAX_ALLOWED_MODELS} models")
    if not all(
        isinstance(name, str) and 0 < len(name) <= MAX_MODEL_NAME_CHARS and name.isprintable()
        for name in value
    ):
        raise InvalidRequestError(
            f"allow_models must hold names of 1 to {MAX_MODEL_NAME_CHARS} characters each"
        )
    return tuple(value)


def _dialect(name: str) -> Dialect:
    if name not in {"", *(dialect.value for dialect in Dialect)}:
        raise InvalidRequestError(f"dialect must be {' or '.join(dialect.value for dialect in Dialect)}")
    return Dialect(name) if name else Dialect.TOOLS


def _runtime(asked: str, tenant: TenantRow, offer: Offer) -> str:
    is_held = not offer.held_to_gvisor.isdisjoint({tenant.tenant_id, EVERYBODY})
    may_have = {GVISOR} if is_held else set(tenant.rules.runtimes or RUNTIMES)
    allowed = [one for one in offer.runtimes if one in may_have]
    if asked and asked not in allowed:
        raise NotAllowedError(
            f"the runtime {asked[:40]!r} is not one that this server offers you:"
            f" {', '.join(allowed) or 'there is none'}"
        )
    if not allowed:
        raise NotAllowedError("this server offers none of the runtimes that you may have")
    return asked or allowed[0]


def _check_scripted(entry: str, listed: Collection[str]) -> None:
    # Before anything looks at it: loading a script runs it. `NAME=MODEL` is looked at on both sides.
    _, is_alias, behind = entry.partition("=")
    for model in (entry, behind) if is_alias else (entry,):
        if model.startswith(SCRIPTED_PREFIX) and model not in listed:
            raise NotAllowedError("scripted models are not for clients of a server")
