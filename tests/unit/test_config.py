from dataclasses import asdict
from pathlib import Path

import pytest

from orchestrator.config import read_settings
from orchestrator.errors import InvalidRequestError
from orchestrator.models.credentials import NAMES
from orchestrator.sandbox.pool_rules import WhenEmpty


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = read_settings({"HOME": "/home/me"})
    assert settings.max_sandboxes == 16
    assert settings.sandbox.memory_mib == 512
    assert (settings.image, settings.platform) == ("", None)


def test_every_setting_is_read() -> None:
    settings = read_settings(
        {
            "RLM_STATE_DIR": "/state",
            "RLM_IMAGE": "sha256:1",
            "RLM_MAX_SANDBOXES": "3",
            "RLM_SANDBOX_MEMORY_MIB": "256",
        }
    )
    assert settings.state_dir == Path("/state")
    assert (settings.image, settings.max_sandboxes, settings.sandbox.memory_mib) == ("sha256:1", 3, 256)


def test_nothing_is_made_ahead_unless_the_settings_say_so() -> None:
    pool = read_settings({"HOME": "/home/me"}).pool
    assert (pool.runc, pool.runsc, pool.when_empty) == (0, 0, WhenEmpty.COLD)
    asked = {"RLM_POOL_RUNC": "2", "RLM_POOL_RUNSC": "0", "RLM_POOL_WHEN_EMPTY": "queue"}
    pool = read_settings({"HOME": "/home/me", **asked}).pool
    assert (pool.runc, pool.runsc, pool.when_empty) == (2, 0, WhenEmpty.QUEUE)


@pytest.mark.parametrize(
    "environment",
    [
        {"RLM_POOL_RUNC": "-1"},
        {"RLM_POOL_RUNSC": "some"},
        {"RLM_POOL_WHEN_EMPTY": "wait"},
        {"RLM_POOL_RUNC": "2", "RLM_POOL_RUNSC": "2", "RLM_MAX_SANDBOXES": "3"},
    ],
)
def test_a_pool_that_makes_no_sense_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(environment))):
        read_settings(environment)


def test_a_misspelt_setting_stops_the_process_and_is_named() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"unknown settings: RLM_SANDBOX_MEM; known are .*RLM_IMAGE"
    ):
        read_settings({"RLM_SANDBOX_MEM": "1"})


def test_the_environment_of_others_is_none_of_our_business() -> None:
    read_settings({"RLMX": "1", "PATH": "/bin", "ANTHROPIC_BASE_URL": "http://elsewhere"})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", " 1", "1e3"])
@pytest.mark.parametrize("name", ["RLM_MAX_SANDBOXES", "RLM_SANDBOX_MEMORY_MIB"])
def test_a_number_that_makes_no_sense_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        read_settings({name: value})


@pytest.mark.parametrize(
    ("euid", "environment", "expected"),
    [
        (0, {"HOME": "/root"}, "/var/lib/rlm"),
        (1000, {"HOME": "/home/me"}, "/home/me/.local/state/rlm"),
        (1000, {"HOME": "/home/me", "XDG_STATE_HOME": "/s"}, "/s/rlm"),
        (1000, {"RLM_STATE_DIR": "/here", "HOME": "/home/me"}, "/here"),
        (1000, {"RLM_STATE_DIR": "", "HOME": "/home/me"}, "/home/me/.local/state/rlm"),
    ],
)
def test_the_state_directory_is_where_the_user_may_write(
    monkeypatch: pytest.MonkeyPatch, euid: int, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: euid)
    assert read_settings(environment).state_dir == Path(expected)


def test_no_credential_ever_gets_into_the_settings() -> None:
    every = {name: f"the secret {name}" for name in NAMES}
    for provider in ("anthropic", "bedrock", "vertex", "foundry"):
        environment = {"HOME": "/", "RLM_PROVIDER": provider, **AWS, **GOOGLE, **AZURE, **every}
        settings = read_settings(environment)
        assert "the secret" not in f"{asdict(settings)}"
        assert not NAMES & settings.provider_environment.keys()


def test_a_password_in_a_proxys_address_is_not_shown_with_the_settings() -> None:
    settings = read_settings({**AWS, "HOME": "/", "RLM_PROVIDER": "bedrock", "HTTPS_PROXY": "http://me:pw@p"})
    assert settings.provider_environment["HTTPS_PROXY"] == "http://me:pw@p"
    assert "pw" not in repr(settings)


def test_prices_and_allowed_models_are_read() -> None:
    settings = read_settings(
        {"HOME": "/", "RLM_PRICES_FILE": "/etc/prices.toml", "RLM_MODELS_ALLOWED": " a, b,,a "}
    )
    assert settings.prices_file == Path("/etc/prices.toml")
    assert settings.models_allowed == ("a", "b")


AWS = {"AWS_REGION": "eu-west-1", "AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "the secret"}
GOOGLE = {"CLOUD_ML_REGION": "europe-west1", "ANTHROPIC_VERTEX_PROJECT_ID": "my-project"}
AZURE = {"ANTHROPIC_FOUNDRY_RESOURCE": "mine", "ANTHROPIC_FOUNDRY_API_KEY": "the secret"}


@pytest.mark.parametrize(
    ("provider", "environment", "url"),
    [
        ("bedrock", AWS, "https://bedrock-runtime.eu-west-1.amazonaws.com"),
        ("bedrock", {"AWS_DEFAULT_REGION": "us-east-1"}, "https://bedrock-runtime.us-east-1.amazonaws.com"),
        ("vertex", GOOGLE, "https://europe-west1-aiplatform.googleapis.com/v1"),
        ("vertex", {**GOOGLE, "CLOUD_ML_REGION": "global"}, "https://aiplatform.googleapis.com/v1"),
        ("vertex", {**GOOGLE, "CLOUD_ML_REGION": "eu"}, "https://aiplatform.eu.rep.googleapis.com/v1"),
        ("foundry", AZURE, "https://mine.services.ai.azure.com/anthropic/"),
    ],
)
def test_a_platform_is_chosen_and_its_credentials_are_left_alone(
    provider: str, environment: dict[str, str], url: str
) -> None:
    settings = read_settings({"HOME": "/", "RLM_PROVIDER": provider, **environment})
    assert settings.platform is not None
    assert settings.platform.url == url
    assert "the secret" not in f"{asdict(settings)}"


@pytest.mark.parametrize("provider", ["", "anthropic"])
def test_anthropics_own_address_is_no_platform(provider: str) -> None:
    assert read_settings({"HOME": "/", "RLM_PROVIDER": provider, **AWS}).platform is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RLM_PROVIDER": "openai"}, "must be anthropic, bedrock, vertex or foundry, not 'openai'"),
        ({"RLM_PROVIDER": "bedrock"}, "RLM_PROVIDER=bedrock needs AWS_DEFAULT_REGION"),
        ({"RLM_PROVIDER": "bedrock", "AWS_REGION": "evil.test/"}, "needs AWS_REGION, a name of letters"),
        ({"RLM_PROVIDER": "vertex", "CLOUD_ML_REGION": "eu"}, "needs ANTHROPIC_VERTEX_PROJECT_ID"),
        ({"RLM_PROVIDER": "foundry"}, "needs ANTHROPIC_FOUNDRY_RESOURCE"),
    ],
)
def test_a_platform_without_what_it_needs_is_refused_by_name(
    environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        read_settings({"HOME": "/", **environment})
