"""Django's source tree: thousands of files as one context, questions with one right answer each."""

import ast
import json
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from tests.e2e.playing import Player
from tests.e2e.public_data import unpacked

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).parent / "scripts" / "django_source.py"

TIMEOUTS = """\
How many function definitions in the Python files (*.py) take a parameter named exactly "timeout"?
A definition is a def or async def, nested ones and methods too; a lambda is none. A parameter may be \
positional, keyword-only, *timeout or **timeout. Answer with the number."""

MUTUAL = """\
Which modules import each other?
Modules are the Python files (*.py); a package is its __init__. An import may stand anywhere in the file, \
inside functions too. "import a.b" imports a.b alone; "from a import b" imports a.b if that is a module \
here, else a; relative imports mean the same as absolute ones. Answer with a JSON list of pairs [a, b], \
a < b, sorted."""


@pytest.fixture(scope="module")
def tree() -> Path:
    return unpacked("django==5.2.8")


@pytest.fixture(scope="module")
def parsed(tree: Path) -> dict[str, ast.Module]:
    """Every Python file by its path."""
    return {
        path.relative_to(tree).as_posix(): ast.parse(path.read_bytes()) for path in sorted(tree.rglob("*.py"))
    }


async def test_parameters_named_timeout_are_counted_exactly(
    player: Player, tree: Path, parsed: dict[str, ast.Module]
) -> None:
    played = await player.run(SCRIPT, tree, question=TIMEOUTS)

    right = sum(takes(node, "timeout") for module in parsed.values() for node in ast.walk(module))
    assert right > 20
    assert played.report.answer == str(right), played.told
    assert f"{len(parsed)} of them Python" in played.told[0]
    assert played.report.context_bytes > 20_000_000
    assert played.report.tally.root_request_bytes < 20_000


async def test_modules_that_import_each_other_are_found_exactly(
    player: Player, tree: Path, parsed: dict[str, ast.Module]
) -> None:
    played = await player.run(SCRIPT, tree, question=MUTUAL)

    right = mutual_imports(parsed)
    assert len(right) > 10
    assert played.report.answer is not None, played.report.error
    assert json.loads(played.report.answer) == right
    assert played.report.tally.child_runs == 1, "the child run got the Python files alone, by reference"


def takes(node: ast.AST, parameter: str) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return any(one is not None and one.arg == parameter for one in named)


def mutual_imports(parsed: dict[str, ast.Module]) -> list[list[str]]:
    modules = {module_name(path): (path, module) for path, module in parsed.items()}
    imported = {
        name: {target for target in imports(module, package_of(name, path), modules.keys()) if target != name}
        for name, (path, module) in modules.items()
    }
    return sorted(
        [name, other]
        for name, others in imported.items()
        for other in others
        if name < other and name in imported.get(other, set())
    )


def module_name(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(name: str, path: str) -> list[str]:
    parts = name.split(".")
    return parts if Path(path).name == "__init__.py" else parts[:-1]


def imports(module: ast.Module, package: list[str], modules: Container[str]) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield submodule if submodule in modules else source
