import pytest

from orchestrator.errors import KeyMissingError
from orchestrator.models import credentials
from orchestrator.models.credentials import checked, for_place, remarkable, with_credentials
from orchestrator.models.platforms import ANTHROPIC_URL, Bedrock, Foundry, Platform, Vertex

OWN_SERVER = "http://127.0.0.1:8080"
EVERY = {name: f"value-of-{name}" for name in credentials.NAMES}
KEYS = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s/+="}


@pytest.mark.parametrize(
    ("platform", "names"),
    [
        (None, {"ANTHROPIC_API_KEY"}),
        (Foundry(resource="mine"), {"ANTHROPIC_FOUNDRY_API_KEY"}),
        (Bedrock(region="eu-west-1"), {"AWS_BEARER_TOKEN_BEDROCK"}),
        (Vertex(region="eu", project_id="p"), set()),
    ],
)
def test_a_place_gets_its_own_credentials_and_no_others(platform: Platform | None, names: set[str]) -> None:
    assert for_place(platform, ANTHROPIC_URL, EVERY).keys() == names


def test_keys_of_amazon_go_with_their_session_and_not_beside_a_token() -> None:
    bedrock = Bedrock(region="eu-west-1")
    given = {**KEYS, "AWS_SESSION_TOKEN": "session"}
    assert for_place(bedrock, bedrock.url, given) == given
    ready = with_credentials(bedrock, given)
    assert isinstance(ready, Bedrock)
    assert (ready.access_key_id, ready.secret_access_key, ready.session_token) == ("AKIA", "s/+=", "session")
    # Amazon's library looks for some: nothing is wrong with that.
    assert for_place(bedrock, bedrock.url, {}) == {}


@pytest.mark.parametrize(
    ("platform", "url", "given", "sentence"),
    [
        (None, ANTHROPIC_URL, {}, "set ANTHROPIC_API_KEY, or name a server with --base-url"),
        (None, ANTHROPIC_URL, {"ANTHROPIC_API_KEY": ""}, "set ANTHROPIC_API_KEY"),
        (Foundry(resource="mine"), OWN_SERVER, {}, "set ANTHROPIC_FOUNDRY_API_KEY"),
        (Bedrock(region="r"), OWN_SERVER, {"AWS_ACCESS_KEY_ID": "AKIA"}, "go together"),
        (Bedrock(region="r"), OWN_SERVER, {"AWS_SECRET_ACCESS_KEY": "s"}, "go together"),
    ],
)
def test_what_is_missing_is_named(
    platform: Platform | None, url: str, given: dict[str, str], sentence: str
) -> None:
    with pytest.raises(KeyMissingError, match=sentence):
        for_place(platform, url, given)


def test_a_server_of_ones_own_needs_no_key() -> None:
    assert for_place(None, OWN_SERVER, {}) == {}


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("sk-ant-1\nsk-ant-2", "a line break"),
        ("sk-ant-1\r\nx-header: 1", "a line break"),
        ("sk-ant\x00", "control character"),
        ("sk-ant\x7f", "control character"),
        ("sk ant", "a space"),
        ("sk\u00a0ant", "a space"),
        ('"sk-ant"', "a quotation mark"),
        ("'sk-ant'", "a quotation mark"),
        ("sk\\ant", "a backslash"),
        ("sk-änt", "outside ASCII"),
        ("sk\udcffant", "outside ASCII"),
        ("  \n\t", "is empty"),
    ],
)
def test_what_cannot_be_a_key_is_refused_in_one_sentence_that_does_not_quote_it(
    value: str, what: str
) -> None:
    with pytest.raises(KeyMissingError, match=f"^ANTHROPIC_API_KEY .*{what}") as caught:
        for_place(None, ANTHROPIC_URL, {"ANTHROPIC_API_KEY": value})
    said = str(caught.value)
    assert "sk" not in said
    assert "\n" not in said


def test_white_space_around_a_key_is_what_files_and_shells_leave_there() -> None:
    assert checked("KEY", " sk-ant-1\r\n") == "sk-ant-1"


def test_a_placeholder_is_no_secret_that_must_not_be_seen_in_a_reply() -> None:
    assert remarkable({"A": "none", "B": "key", "C": "sk-ant-0123456789"}) == (b"sk-ant-0123456789",)
