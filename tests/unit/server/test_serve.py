from pathlib import Path

import pytest

from orchestrator.config import Settings, read_settings
from orchestrator.errors import InvalidRequestError, MachineError
from orchestrator.server.serve import _own, _runtimes


def test_a_state_directory_has_one_server_at_a_time_and_keeps_its_id(tmp_path: Path) -> None:
    with _own(tmp_path / "service") as home:
        assert home
        with pytest.raises(MachineError, match="another server"), _own(tmp_path / "service"):
            pass
    with _own(tmp_path / "service") as again:
        assert again == home
    with _own(tmp_path / "elsewhere") as other:
        assert other != home


def test_a_state_directory_that_lost_its_id_loses_no_context_by_that(tmp_path: Path) -> None:
    with _own(tmp_path / "service"):
        (tmp_path / "service" / "contexts" / "tenant").mkdir(parents=True)
    (tmp_path / "service" / "home").unlink()
    with pytest.raises(MachineError, match="restore it"), _own(tmp_path / "service"):
        pass


@pytest.mark.parametrize(
    ("environment", "offered"),
    [
        ({}, ["runc"]),
        ({"RLM_RUNTIMES": "runsc, runc"}, ["runsc", "runc"]),
        ({"RLM_RUNSC_TENANTS": "*"}, ["runsc"]),
        ({"RLM_RUNSC_TENANTS": "acme"}, ["runc", "runsc"]),
    ],
)
def test_a_server_offers_the_runtimes_that_its_settings_need(
    environment: dict[str, str], offered: list[str]
) -> None:
    assert list(_runtimes(read_settings({"HOME": "/home/me", **environment}))) == offered


def test_every_setting_of_the_service_is_read() -> None:
    service = read_settings(
        {
            "HOME": "/home/me",
            "RLM_GRPC": "0.0.0.0:1",
            "RLM_HTTP": "off",
            "RLM_STORE": "sqlite:////tmp/x.db",
            "RLM_BASE_URL": "http://localhost:9",
            "RLM_MODEL": "m",
            "RLM_MAX_RUNS": "3",
            "RLM_DRAIN_S": "0",
            "RLM_TLS_CERT_FILE": "/c",
            "RLM_TLS_KEY_FILE": "/k",
            "RLM_TLS_CLIENT_CA_FILE": "/a",
            "RLM_LOG": "json",
            "RLM_METRICS": "127.0.0.1:9",
            "RLM_ADMIN": "off",
            "RLM_METRICS_BY_TENANT": "yes",
            "RLM_TRACES": "http://localhost:4317",
        }
    ).service
    assert (service.grpc, service.http, service.store) == ("0.0.0.0:1", "off", "sqlite:////tmp/x.db")
    assert (service.base_url, service.model, service.sub_model) == ("http://localhost:9", "m", "m")
    assert service.log_json
    assert (service.max_runs, service.drain_s, service.metrics_by_tenant) == (3, 0.0, True)
    assert service.metrics == "127.0.0.1:9"
    assert not service.admin
    assert (service.tls_cert_file, service.tls_key_file) == (Path("/c"), Path("/k"))
    assert (service.tls_client_ca_file, service.traces) == (Path("/a"), "http://localhost:4317")


@pytest.mark.parametrize(
    "environment",
    [
        {"RLM_MAX_RUNS": "0"},
        {"RLM_DRAIN_S": "soon"},
        {"RLM_TLS_CERT_FILE": "/c"},
        {"RLM_TLS_CLIENT_CA_FILE": "/a"},
        {"RLM_METRICS_BY_TENANT": "perhaps"},
        {"RLM_LOG": "xml"},
        {"RLM_ADMIN": "no"},
        {"RLM_RUNTIMES": "kata"},
        {"RLM_TRACES": "localhost:4317"},
        {"RLM_STOER": "sqlite:///x"},
    ],
)
def test_a_setting_of_the_service_that_makes_no_sense_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(environment))):
        read_settings({"HOME": "/home/me", **environment})


def test_the_defaults_listen_on_this_machine_only() -> None:
    service = Settings(state_dir=Path("/nowhere")).service
    assert service.grpc.startswith("127.0.0.1:")
    assert service.http.startswith("127.0.0.1:")
    assert service.metrics == "off"
