"""What the orchestrator's own source must not contain: ways in which data becomes code, or a shell's words.

Read off the syntax tree, so that an alias or a line break hides nothing. Names that are put together at run
time (`getattr(builtins, "ev" + "al")`) are not seen; no reviewer would let one pass either.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

MODULES = frozenset(
    {
        # data that is turned into objects of the sender's choice
        *("pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "jsonpickle", "joblib"),
        *("marshal", "shelve", "dbm", "copyreg", "yaml", "ruamel", "torch", "numpy", "pandas"),
        # they pickle on their own
        *("multiprocessing", "concurrent.futures.process", "xmlrpc", "logging.config"),
        # code from text
        *("code", "codeop", "runpy", "imp", "pty", "pdb", "string.Template"),
        "importlib",
    }
)
SAFE_MODULES = frozenset(
    {"importlib.resources", "importlib.metadata", "importlib.util", "importlib.util.find_spec"}
)
"""Below a forbidden one."""
NAMES = frozenset({"eval", "exec", "compile", "__import__", "breakpoint"})
"""Built in. Their mention is enough, called or not."""
ATTRIBUTES = frozenset(
    {
        *("import_module", "exec_module", "load_module", "spec_from_file_location", "spec_from_loader"),
        *("popen", "getoutput", "getstatusoutput", "create_subprocess_shell", "subprocess_shell"),
        *("execv", "execve", "execvp", "execvpe", "execl", "execle", "execlp", "execlpe"),
        *("spawnv", "spawnve", "spawnl", "spawnlp", "spawnvp", "posix_spawn", "posix_spawnp"),
        *("format_map", "unsafe_load", "full_load", "allow_pickle"),
        *("exec_run", "exec_create", "exec_start", "put_archive", "get_archive"),
    }
)


class Found(NamedTuple):
    """A forbidden thing, and where."""

    line: int
    what: str


def forbidden_in(source: str) -> Iterator[Found]:
    """All of it in a module's source."""
    for node in ast.walk(ast.parse(source)):
        for what in _in_node(node):
            yield Found(getattr(node, "lineno", 0), what)


def _in_node(node: ast.AST) -> Iterator[str]:  # noqa: PLR0912 - a table
    match node:
        case ast.Import(names):
            yield from (alias.name for alias in names if _is_forbidden(alias.name))
        case ast.ImportFrom(module, names, 0):
            for alias in names:
                if _is_forbidden(f"{module}.{alias.name}") or alias.name in ATTRIBUTES | {"system"}:
                    yield f"{module}.{alias.name}"
        case ast.Name(name) if name in NAMES:
            yield name
        case ast.Attribute(ast.Name("re"), "compile"):
            pass
        case ast.Attribute(_, name) if name in ATTRIBUTES:
            yield name
        # A word of its own elsewhere: the system prompt.
        case ast.Attribute(ast.Name("os" | "posix"), "system"):
            yield "os.system"
        case ast.Call(ast.Attribute(ast.Constant(), "format")):
            pass
        # A handler of the logging module formats its own record.
        case ast.Call(ast.Attribute(ast.Name("self"), "format")):
            pass
        case ast.Call(ast.Attribute(_, "format")):
            yield "str.format of a template that is no literal"
        case ast.BinOp(left, ast.Mod(), ast.Tuple() | ast.Dict()) if not isinstance(left, ast.Constant):
            yield "% of a template that is no literal"
        case ast.keyword("shell"):
            yield "shell="
        case ast.Attribute(_, "Template"):
            yield "string.Template"


def _is_forbidden(name: str) -> bool:
    parts = name.split(".")
    prefixes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return bool(prefixes & MODULES) and not prefixes & SAFE_MODULES
