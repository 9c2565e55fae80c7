"""Options that several commands have, written down once."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def with_options(
    template: Callable[..., None], read: Callable[..., T], parameter: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command the options of a template.

    Args:
        template: Its parameters are the options, as typer takes them.
        read: Makes one value of what was given.
        parameter: The command's, that gets this value.
    """
    theirs = inspect.signature(template).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for one in inspect.signature(command).parameters.values() if one.name != parameter]

        @functools.wraps(command)
        def with_them(**given: Any) -> None:
            value = read(**{name: given.pop(name) for name in theirs})
            command(**given, **{parameter: value})

        # What typer looks at; following `__wrapped__` it would see the command alone.
        del with_them.__wrapped__
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *theirs.values())]
        with_them.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_them.__annotations__ = {one.name: one.annotation for one in parameters}
        return with_them

    return decorate
