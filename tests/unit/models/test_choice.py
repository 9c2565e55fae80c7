from collections.abc import Sequence
from decimal import Decimal

import pytest

from orchestrator.errors import InvalidRequestError, ModelNotAllowedError
from orchestrator.models import catalogue
from orchestrator.models.choice import HandPrice, Policy, Wanted, choose
from orchestrator.models.price_file import PriceList
from orchestrator.pricing import ModelCard

SONNET, HAIKU, OPUS = "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5-5"
FREE = HandPrice(input_usd=Decimal(0), output_usd=Decimal(0), window_tokens=8_192)


def chosen(
    *allow: str,
    root: str = SONNET,
    sub: str = HAIKU,
    allowed: Sequence[str] = (),
    aliases: dict[str, str] | None = None,
    by_hand: HandPrice | None = None,
) -> dict[str, ModelCard]:
    prices = PriceList(aliases=aliases or {})
    return choose(
        Wanted(roles={"root": root, "sub": sub}, allow=allow, by_hand=by_hand),
        Policy(prices=prices, allowed=allowed),
    )


def names(cards: dict[str, ModelCard]) -> set[str]:
    return set(cards)


def test_a_run_has_its_two_models_under_their_names_and_roles() -> None:
    cards = chosen()
    assert names(cards) == {"root", "sub", SONNET, HAIKU}
    assert cards["root"] is cards[SONNET]
    assert cards["sub"] is cards[HAIKU]


def test_one_model_can_have_both_roles() -> None:
    assert names(chosen(root=HAIKU)) == {"root", "sub", HAIKU}


def test_a_run_can_allow_more_models_and_name_them() -> None:
    cards = chosen("deep=" + OPUS, "claude-opus-5")
    assert names(cards) == {"root", "sub", SONNET, HAIKU, OPUS, "deep", "claude-opus-5"}
    assert cards["deep"] is cards[OPUS]


def test_an_alias_of_the_settings_is_a_name_and_opens_nothing() -> None:
    aliases = {"quick": HAIKU, "deep": OPUS}
    assert names(chosen(aliases=aliases)) == {"root", "sub", SONNET, HAIKU, "quick"}
    assert names(chosen("deep", root="quick", aliases=aliases)) == {
        "root",
        "sub",
        HAIKU,
        OPUS,
        "quick",
        "deep",
    }


def test_a_runs_own_alias_may_stand_for_one_of_the_settings() -> None:
    assert chosen("best=deep", aliases={"deep": OPUS})["best"].name == OPUS


def test_cells_may_name_all_that_the_settings_allow_unless_the_run_narrows_it() -> None:
    allowed = [SONNET, HAIKU, "deep", "claude-opus-5"]
    aliases = {"deep": OPUS}
    everything = {"root", "sub", SONNET, HAIKU, OPUS, "deep", "claude-opus-5"}
    assert names(chosen(allowed=allowed, aliases=aliases)) == everything
    narrowed = chosen("claude-opus-5", allowed=allowed, aliases=aliases)
    assert names(narrowed) == everything - {OPUS, "deep"}


@pytest.mark.parametrize(
    ("root", "sub", "allow"), [(OPUS, HAIKU, ()), (SONNET, OPUS, ()), (SONNET, HAIKU, (OPUS,))]
)
def test_what_the_settings_do_not_allow_has_no_role_at_all(root: str, sub: str, allow: Sequence[str]) -> None:
    with pytest.raises(
        ModelNotAllowedError, match=f"do not allow the model '{OPUS}'.* has: {SONNET}, {HAIKU}"
    ):
        chosen(*allow, root=root, sub=sub, allowed=[SONNET, HAIKU])


def test_an_alias_is_no_way_around_the_settings() -> None:
    with pytest.raises(ModelNotAllowedError, match=OPUS):
        chosen("mine=" + OPUS, allowed=[SONNET, HAIKU])


def test_a_scripted_model_is_not_the_settings_concern() -> None:
    cards = chosen(root="scripted:a=b.py", allowed=[HAIKU])
    assert names(cards) == {"root", "sub", HAIKU, "scripted:a=b.py"}


def test_i17_every_model_a_cell_could_name_has_a_price_before_the_run_starts() -> None:
    for wrong in ({"root": "gemma"}, {"sub": "gemma"}, {"allowed": [SONNET, HAIKU, "gemma"]}):
        with pytest.raises(ModelNotAllowedError, match="no price is known for the model 'gemma'"):
            chosen(**wrong)
    with pytest.raises(ModelNotAllowedError, match="no price is known for the model 'gemma'"):
        chosen("gemma")


def test_a_price_by_hand_is_for_the_models_that_nothing_else_prices() -> None:
    cards = chosen(sub="gemma", by_hand=FREE)
    assert cards["sub"].tiers[0].output == 0
    assert (cards["sub"].window_tokens, cards["sub"].max_output_tokens) == (8_192, 8_192)
    assert cards["root"] == catalogue.lookup(SONNET)


def test_a_scripted_model_stays_free_beside_a_model_priced_by_hand() -> None:
    dear = HandPrice(input_usd=Decimal(3), output_usd=Decimal(15))
    cards = chosen(root="scripted:x.py", sub="gemma", by_hand=dear)
    assert cards["root"].tiers[0].input == 0
    assert (cards["sub"].tiers[0].input, cards["sub"].window_tokens) == (3_000_000, 200_000)


def test_a_known_price_is_never_replaced_by_hand() -> None:
    with pytest.raises(InvalidRequestError, match="RLM_PRICES_FILE can change known prices"):
        chosen(by_hand=FREE)


@pytest.mark.parametrize("name", ["root", "sub", OPUS, "a b", "", "-x"])
def test_an_alias_never_hides_a_role_or_a_model(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot stand for another|is no name for a model"):
        chosen(f"{name}={HAIKU}")


def test_an_alias_for_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="names no model"):
        chosen("quick=")
