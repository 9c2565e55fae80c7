import pytest

from orchestrator.models.credentials import NAMES
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.models.provider.environment import environment_for

BEDROCK, VERTEX = Bedrock(region="eu-west-1"), Vertex(region="eu", project_id="p")
EVERYBODYS = {"HOME": "/home/me", "PATH": "/bin", "SSL_CERT_FILE": "/etc/ca.pem", "LANG": "C.UTF-8"}
STEERING = {
    "ANTHROPIC_BASE_URL": "http://evil.test",
    "ANTHROPIC_LOG": "debug",
    "ANTHROPIC_CUSTOM_HEADERS": "x: 1",
    "LD_PRELOAD": "/tmp/evil.so",
    "PYTHONSTARTUP": "/tmp/evil.py",
    "GITHUB_TOKEN": "of somebody else",
    "RLM_STATE_DIR": "/state",
}
PROXIES = {"HTTPS_PROXY": "http://proxy", "no_proxy": "169.254.169.254", "REQUESTS_CA_BUNDLE": "/etc/ca.pem"}
AMAZONS = {"AWS_CONFIG_FILE": "/aws", "AWS_WEB_IDENTITY_TOKEN_FILE": "/token", "AWS_ROLE_ARN": "arn"}
GOOGLES = {
    "GOOGLE_APPLICATION_CREDENTIALS": "/adc.json",
    "CLOUDSDK_CONFIG": "/gcloud",
    "GCE_METADATA_HOST": "m",
}
ALL = {
    **EVERYBODYS, **STEERING, **PROXIES, **AMAZONS, **GOOGLES, **dict.fromkeys(NAMES, "secret"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        (None, EVERYBODYS),
        (Foundry(resource="mine"), EVERYBODYS),
        (BEDROCK, {**EVERYBODYS, **PROXIES, **AMAZONS}),
        (VERTEX, {**EVERYBODYS, **PROXIES, **GOOGLES}),
    ],
)
def test_the_process_has_what_it_needs_and_nothing_else(
    platform: Platform | None, expected: dict[str, str]
) -> None:
    assert environment_for(platform, ALL) == expected
