from pathlib import Path

import pytest

from orchestrator.config import Settings, read_settings
from orchestrator.errors import InvalidRequestError


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = read_settings({"HOME": "/home/me"})
    assert settings.max_sandboxes == 16
    assert settings.sandbox.memory_mib == 512
    assert (settings.image, settings.api_key) == ("", "")


def test_every_setting_is_read() -> None:
    settings = read_settings(
        {
            "RLM_STATE_DIR": "/state",
            "RLM_IMAGE": "sha256:1",
            "RLM_MAX_SANDBOXES": "3",
            "RLM_SANDBOX_MEMORY_MIB": "256",
            "ANTHROPIC_API_KEY": "the key",
        }
    )
    assert settings.state_dir == Path("/state")
    assert (settings.image, settings.max_sandboxes, settings.sandbox.memory_mib) == ("sha256:1", 3, 256)
    assert settings.api_key == "the key"


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


def test_the_key_is_not_shown_with_the_settings() -> None:
    assert "the key" not in repr(Settings(state_dir=Path("/"), api_key="the key"))
