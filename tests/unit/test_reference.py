import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def test_the_reference_is_what_protos_and_routes_say() -> None:
    """`make protos` writes it."""
    check = [sys.executable, "docs/make-reference", "--check"]
    done = subprocess.run(check, cwd=PROJECT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
