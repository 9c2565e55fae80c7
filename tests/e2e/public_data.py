"""Public data from PyPI: downloaded once, without dependencies, checked against a hash, kept in a cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_HASHES = {
    "lifetimes==0.11.3": "261e3dc89977c2b60767ca6728aaa29d429de0c814635070a749c36555895da8",
    "django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
}


def unpacked(requirement: str) -> Path:
    """The files of a wheel. They must not be changed.

    Args:
        requirement: One of those whose hash is known here.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlm-orchestrator"
    directory = cache / f"{requirement}-{_HASHES[requirement][:16]}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as workspace:
            files = Path(workspace) / "files"
            zipfile.ZipFile(_download(requirement, Path(workspace))).extractall(files)
            # In one step, and the last: what is in the cache is whole.
            files.rename(directory)
    return directory


def _download(requirement: str, workspace: Path) -> Path:
    pinned = workspace / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{_HASHES[requirement]}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(pinned)]
    subprocess.run([*command, "--dest", str(workspace)], check=True, timeout=120)
    (wheel,) = workspace.glob("*.whl")
    return wheel
