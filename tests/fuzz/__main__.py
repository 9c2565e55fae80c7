"""`python -m tests.fuzz TARGET [--seconds N]`: libFuzzer over one target; `--make-corpus` writes the seeds.

Needs atheris (`pip install '.[fuzz]'`). The inputs it found are left in `build/fuzz/TARGET`. One that breaks
a promise ends it with an exit code, and is beside that directory; it belongs into the corpus beside the fix.
"""

import argparse
import hashlib
import importlib
import shutil
import sys
from pathlib import Path

from tests.fuzz import TARGETS

_CORPUS = Path(__file__).parent / "corpus"
_FOUND = Path("build/fuzz")
_ONE_INPUT_S = 10
"""Whatever takes longer is a finding."""
_MEMORY_MIB = 1024
_MAX_INPUT_BYTES = 16 * 1024


def main() -> None:
    """One target for a while, or the corpus of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--make-corpus", action="store_true")
    options = parser.parse_args()
    if options.make_corpus:
        for name in TARGETS:
            _write_seeds(name)
    elif options.target:
        _fuzz(options.target, options.seconds)
    else:
        parser.error("name a target")


def _write_seeds(name: str) -> None:
    """Named by their hash, as libFuzzer names what it finds."""
    directory = _CORPUS / name
    directory.mkdir(parents=True, exist_ok=True)
    for seed in importlib.import_module(f"tests.fuzz.{name}").seeds():
        (directory / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def _fuzz(name: str, seconds: int) -> None:
    try:
        import atheris  # noqa: PLC0415 # there is no wheel of it for every machine
    except ImportError:
        sys.exit("fuzz: atheris is not installed (pip install '.[fuzz]'); it has wheels for Linux on x86_64")
    with atheris.instrument_imports(include=["orchestrator", "sandbox_image", "tarfile", "zipfile"]):
        target = importlib.import_module(f"tests.fuzz.{name}")
    found = _FOUND / name
    shutil.copytree(_CORPUS / name, found, dirs_exist_ok=True)
    arguments = [
        str(found),
        f"-max_total_time={seconds}",
        f"-max_len={_MAX_INPUT_BYTES}",
        f"-timeout={_ONE_INPUT_S}",
        f"-rss_limit_mb={_MEMORY_MIB}",
        f"-artifact_prefix={found}/../{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *arguments], target.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
