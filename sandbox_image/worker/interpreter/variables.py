"""The variables cells have made, listed without trusting them: any of their methods may raise or hang."""

from collections.abc import Iterable, Mapping
from typing import Any

_SHOWN = 200


def variable_names(namespace: Mapping[Any, Any], preset: Iterable[str]) -> list[str]:
    """Names in a namespace besides the preset ones and Python's own, sorted."""
    known = set(preset)
    # A copy, taken in one step: threads that outlive their cell may still bind names.
    names = [name for name in list(namespace) if type(name) is str]
    return sorted(name for name in names if name not in known and not _is_dunder(name))


def describe_variables(namespace: Mapping[Any, Any], preset: Iterable[str] = ()) -> str:
    """One line for each variable: name, type, size."""
    names = variable_names(namespace, preset)
    if not names:
        return "no variables yet"
    lines = [f"{name}: {_describe(namespace.get(name))}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"... {len(names) - _SHOWN} more")
    return "\n".join(lines)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, bool | int | float | None) and len(str(value)) < 40:
        return f"{kind} = {value}"
    if isinstance(value, str | bytes | list | tuple | dict | set | frozenset):
        return f"{kind}, length {len(value):,}"
    return kind
