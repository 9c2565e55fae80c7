from pathlib import Path

import pytest

from orchestrator.errors import InvalidRequestError
from orchestrator.models import catalogue, price_file
from orchestrator.pricing import Usage

GOOD = """
[aliases]
quick = "local-7b"

[[model]]
name = "local-7b"
window_tokens = 32_768
max_output_tokens = 8_192
tiers = [
    { up_to_input_tokens = 10_000, input = 0.1, output = 0.30, cache_read = 0.000_000_1, cache_write = 0 },
    { input = 1, output = 2, cache_read = 0.5, cache_write = 1.25 },
]
"""


def test_prices_are_exact_to_the_micro_dollar_and_rounded_up_below_it() -> None:
    card = price_file.parse(GOOD).cards["local-7b"]
    first, last = card.tiers
    assert (first.input, first.output, first.cache_read, first.cache_write) == (100_000, 300_000, 1, 0)
    assert (last.input, last.up_to_input_tokens) == (1_000_000, 32_768)
    assert (card.window_tokens, card.max_output_tokens) == (32_768, 8_192)
    assert card.cost_microusd(Usage(input=10_000, output=1_000)) == 1_000 + 300


def test_an_entry_replaces_the_one_we_ship(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(GOOD.replace("local-7b", "claude-opus-5-5"))
    card = catalogue.lookup("claude-opus-5-5", price_file.read(path).cards)
    assert card.window_tokens == 32_768


def test_a_price_of_zero_in_the_file_is_free() -> None:
    text = """
        [[model]]
        name = "mine"
        window_tokens = 4096
        max_output_tokens = 4096
        tiers = [{ input = 0, output = 0, cache_read = 0, cache_write = 0 }]
    """
    card = catalogue.lookup("mine", price_file.parse(text).cards)
    assert card.cost_microusd(Usage(1_000, 1_000, 1_000, 1_000)) == 0


def test_our_own_file_is_read_as_strictly_as_a_users() -> None:
    assert "claude-haiku-5-5" in catalogue.known_models()


TIER = (
    "{ up_to_input_tokens = 10_000, input = 0.1, output = 0.30, cache_read = 0.000_000_1, cache_write = 0 }"
)
PRICE = "has to be an amount of US dollars"
COUNT = "has to be a whole number of tokens above 0"


@pytest.mark.parametrize(
    ("was", "becomes", "sentence"),
    [
        ("[[model]]", "[model]", "models are written as tables headed"),
        ("[[model]]", "[[models]]", "the file has no field 'models'"),
        ('name = "local-7b"', "", "has no name"),
        ("window_tokens", "windows_tokens", "'local-7b' has no field 'windows_tokens'; there are "),
        ("window_tokens = 32_768", "", f"'local-7b': window_tokens {COUNT}"),
        ("32_768", "0", f"window_tokens {COUNT}"),
        ("32_768", "true", f"window_tokens {COUNT}"),
        ("32_768", "1e5", f"window_tokens {COUNT}"),
        ("8_192", "40_000", "max_output_tokens is larger than window_tokens"),
        ("tiers = [", "tiers = [] # [", "is no TOML"),
        ("input = 0.1,", "", f"tier 1: input {PRICE}"),
        ("input = 0.1,", "input = -0.1,", f"tier 1: input {PRICE}"),
        ("input = 0.1,", "input = nan,", f"tier 1: input {PRICE}"),
        ("input = 0.1,", "input = inf,", f"tier 1: input {PRICE}"),
        ("input = 0.1,", 'input = "0.1",', f"tier 1: input {PRICE}"),
        ("input = 0.1,", "input = true,", f"tier 1: input {PRICE}"),
        ("input = 0.1,", "input = 1e7,", f"tier 1: input {PRICE}"),
        ("cache_write = 1.25", "cache_writes = 1.25", "tier 2 has no field 'cache_writes'"),
        ("up_to_input_tokens = 10_000,", "", f"tier 1: up_to_input_tokens {COUNT}"),
        ("10_000", "40_000", "tier 2: up_to_input_tokens must rise"),
        ("{ input = 1,", "{ up_to_input_tokens = 20_000, input = 1,", "tier 2: the last tier must reach"),
        (TIER, "3", "tiers has to be a list of one or more tables"),
        ('[aliases]\nquick = "local-7b"', "aliases = 3", "aliases are written in a table"),
        ('quick = "local-7b"', "quick = 7", "the alias 'quick' has to stand for the name of a model"),
        ('quick = "local-7b"', '"q q" = "local-7b"', "'q q' is no name for a model"),
        ('quick = "local-7b"', 'quick = "slow"\nslow = "x"', "'quick' stands for another alias"),
        ("name", "name = 1 = ", "is no TOML"),
        (GOOD, "", ""),
    ],
)
def test_every_mistake_is_one_sentence_that_says_where(
    tmp_path: Path, was: str, becomes: str, sentence: str
) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(GOOD.replace(was, becomes, 1))
    if not sentence:
        assert price_file.read(path).cards == {}
        return
    with pytest.raises(InvalidRequestError) as caught:
        price_file.read(path)
    told = str(caught.value)
    assert told.startswith(f"the price file {path}")
    assert sentence in told
    assert "\n" not in told


def test_a_model_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'local-7b' is there twice"):
        price_file.parse(GOOD + GOOD.partition("[[model]]")[1] + GOOD.partition("[[model]]")[2])


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"none\.toml cannot be read: No such file"):
        price_file.read(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequestError, match="is no TOML"):
        price_file.read(tmp_path / "binary.toml")
