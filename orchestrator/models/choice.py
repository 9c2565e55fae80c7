"""Which models a run may use, under which names. Pure.

Rules:

1. A run has a model for its turns and one for sub-calls. Cells may name both, and what the run allows
   besides.
2. The settings can have a list of allowed models. Then no run uses another one, in any role, and cells may
   name all of the list unless the run narrows it. Without a list, cells may name what the run says. A
   scripted model is the caller's own program, not a provider's model: the list does not concern it.
3. Every model of a run has a price before the run starts. Prices given by hand are for those that nothing
   else prices: a known price is never replaced by a slip of the command line.
4. An alias is another name for one model. It opens nothing by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from orchestrator.errors import InvalidRequestError, ModelNotAllowedError
from orchestrator.models import catalogue
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.models.price_file import PriceList, check_alias
from orchestrator.pricing import ModelCard


@dataclass(frozen=True, kw_only=True, slots=True)
class HandPrice:
    """Price and size of models that nothing else knows."""

    input_usd: Decimal
    """For a million tokens; so is the next."""
    output_usd: Decimal
    window_tokens: int | None = None
    """None for the usual one."""

    def card(self, name: str) -> ModelCard:
        """The card of such a model."""
        if self.window_tokens is None:
            return catalogue.priced_by_hand(name, input_usd=self.input_usd, output_usd=self.output_usd)
        return catalogue.priced_by_hand(
            name, input_usd=self.input_usd, output_usd=self.output_usd, window_tokens=self.window_tokens
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The models one run asks for."""

    roles: Mapping[str, str]
    """From `root` and `sub` to names of models or aliases."""
    allow: Sequence[str] = ()
    """What cells may name besides: `MODEL`, or `NAME=MODEL` to give it a name of one's own."""
    by_hand: HandPrice | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the settings say about models."""

    prices: PriceList = field(default_factory=PriceList)
    allowed: Sequence[str] = ()
    """Empty for any model."""


def choose(wanted: Wanted, policy: Policy) -> dict[str, ModelCard]:
    """The run's models by every name under which a cell may ask for them, the roles included.

    Raises:
        ModelNotAllowedError: The settings don't allow a model, or nothing says what it costs.
        InvalidRequestError: A name that cannot be one, or prices for no model.
    """
    own = dict(_named(entry) for entry in wanted.allow)
    aliases = {**policy.prices.aliases, **{name: model for name, model in own.items() if name != model}}
    for alias in aliases:
        _check_alias(alias, wanted.roles, policy.prices)

    def target(name: str) -> str:
        # Of a run's own alias too: it may stand for one of the settings'.
        model = aliases.get(name, name)
        return policy.prices.aliases.get(model, model)

    listed = [target(name) for name in policy.allowed]
    models = list(
        dict.fromkeys([*map(target, wanted.roles.values()), *(map(target, own) if own else listed)])
    )
    for model in models:
        if listed and model not in listed and not model.startswith(SCRIPTED_PREFIX):
            raise ModelNotAllowedError(
                f"the settings do not allow the model {model[:100]!r}; RLM_MODELS_ALLOWED has:"
                f" {', '.join(policy.allowed)}"
            )
    cards = {model: _card(model, wanted.by_hand, policy.prices) for model in models}
    if wanted.by_hand is not None:
        _check_used(wanted.by_hand, cards.values(), policy.prices)
    named = {alias: cards[target(alias)] for alias in aliases if target(alias) in cards}
    return {**cards, **named, **{role: cards[target(name)] for role, name in wanted.roles.items()}}


def _named(entry: str) -> tuple[str, str]:
    name, is_alias, model = entry.partition("=")
    # A path may hold the sign too.
    if not is_alias or name.startswith(SCRIPTED_PREFIX):
        return entry, entry
    if not model:
        raise InvalidRequestError(f"{entry[:100]!r} names no model; NAME=MODEL does")
    return name, model


def _check_alias(name: str, roles: Mapping[str, str], prices: PriceList) -> None:
    check_alias(name)
    if name in roles or name in prices.cards or name in catalogue.known_models():
        raise InvalidRequestError(f"{name!r} is a model's name already and cannot stand for another")


def _card(model: str, by_hand: HandPrice | None, prices: PriceList) -> ModelCard:
    if by_hand is not None and not _is_priced(model, prices):
        return by_hand.card(model)
    return catalogue.lookup(model, prices.cards)


def _is_priced(model: str, prices: PriceList) -> bool:
    try:
        catalogue.lookup(model, prices.cards)
    except ModelNotAllowedError:
        return False
    return True


def _check_used(by_hand: HandPrice, cards: Iterable[ModelCard], prices: PriceList) -> None:
    if all(_is_priced(card.name, prices) for card in cards):
        raise InvalidRequestError(
            "the prices given by hand are for models without a known price, and this run has none;"
            " the file RLM_PRICES_FILE can change known prices"
        )
