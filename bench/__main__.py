"""Runs benchmarks one after the other, each in a process of its own, then writes the page: `python -m bench`.

`python -m bench NAME...` runs some. A benchmark is a module in this folder whose first sentence says how to
run it. One that fails does not stop the others; its last result stays, and the exit code tells.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

_FOLDER = Path(__file__).parent
_MOST_S = 600.0
"""Of one benchmark. All of them together are meant to end within 20 minutes."""
_WHEN_NAMED = {"input_bound", "model_transport", "transport"}
"""They take minutes each, and stand behind decisions that a change rarely touches."""


def benchmarks() -> list[str]:
    """Their names."""
    says_how = {
        path.stem: re.search(rf"`python -m bench\.{path.stem}\b", path.read_text().partition("\n")[0])
        for path in sorted(_FOLDER.glob("*.py"))
    }
    return [name for name, found in says_how.items() if found and name != "page"]


def run(name: str) -> bool:
    """Whether it succeeded."""
    print(f"bench: {name}", flush=True)
    started_s = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", f"bench.{name}"], check=False, timeout=_MOST_S, stdin=subprocess.DEVNULL
        ).returncode
        how = "done" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        how = f"failed: not done within {_MOST_S:g} s"
    print(f"bench: {name} {how}, {time.monotonic() - started_s:.0f} s", flush=True)
    return how == "done"


def main() -> None:
    """Run them, and say which failed."""
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures, and writes the page.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    names = parser.parse_args().names or [name for name in known if name not in _WHEN_NAMED]
    if unknown := set(names) - set(known):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = [name for name in names if not run(name)]
    written = subprocess.run([sys.executable, "-m", "bench.page"], check=False).returncode == 0
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    raise SystemExit(bool(failed) or not written)


if __name__ == "__main__":
    main()
