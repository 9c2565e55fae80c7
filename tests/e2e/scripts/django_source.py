"""Plays a model that answers questions about a source tree with the compiler's own view of it.

Neither answer is found the way the tests check it: they read syntax trees, this symbol tables and bytecode.
"""

from collections.abc import Generator

PEEK = """\
sources = [path for path in context if path.endswith(".py")]
print(len(context), "files,", len(sources), "of them Python:", sources[:3])
"""

COUNT = """\
import symtable

def functions(table):
    for below in table.get_children():
        # A def cannot be called lambda, so a table of that name is one.
        if below.get_type() == "function" and below.get_name() != "lambda":
            yield below
        yield from functions(below)

count = 0
for path in sources:
    table = symtable.symtable(context[path], path, "exec")
    count += sum("timeout" in function.get_parameters() for function in functions(table))
FINAL(count)
"""

ASK_CHILD = """\
import json

pairs = json.loads(rlm_query("Which of these modules import each other?", context.subset(sources)))
print(len(pairs), "pairs")
FINAL(pairs)
"""

CHILD_MODULES = """\
modules = {}
for path in context:
    name = path[:-len(".py")].replace("/", ".")
    modules[name.removesuffix(".__init__")] = path
print(len(modules), "modules")
"""

CHILD_IMPORTS = """\
import dis, types

def imports_in(code):
    \"\"\"(level, module, names) of every import, also of those inside functions.\"\"\"
    before = [None, None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            yield before[0], instruction.argval, before[1] or ()
        before = [before[1], instruction.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports_in(constant)

def imported_by(module, path):
    package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
    for level, name, names in imports_in(compile(context[path], path, "exec", optimize=0, dont_inherit=True)):
        if level:
            parts = package.split(".")
            name = ".".join(parts[:len(parts) - level + 1] + ([name] if name else []))
        for one in names or [None]:
            below = f"{name}.{one}"
            yield below if one and below in modules else name

imported = {module: set(imported_by(module, path)) for module, path in modules.items()}
FINAL(sorted([a, b] for a in modules for b in imported[a] if a < b and a in imported.get(b, ())))
"""


def run(question: str, depth: int) -> Generator[str, str, str]:
    """Play the model of a run."""
    if depth:
        yield CHILD_MODULES
        yield CHILD_IMPORTS
        return "The imports could not be read."
    yield PEEK
    yield COUNT if "timeout" in question else ASK_CHILD
    return "There is no answer."
