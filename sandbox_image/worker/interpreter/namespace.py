"""The module that cells run in."""

import builtins
import sys
from types import ModuleType
from typing import Any, NoReturn

from sandbox_image.worker.interpreter import errors, names

_FUNCTIONS = (
    names.llm_query,
    names.llm_query_batched,
    names.rlm_query,
    names.rlm_query_batched,
    names.allm_query,
    names.allm_query_batched,
    names.arlm_query,
    names.arlm_query_batched,
    names.budget,
    names.FINAL,
    names.FINAL_VAR,
    names.SHOW_VARS,
)

_EXCEPTIONS = (errors.SubCallError, *errors.SubCallError.__subclasses__())


def make_namespace() -> dict[str, Any]:
    """A fresh `__main__` with the names of the guest library; `context` joins them at the lease.

    It takes the place of the real `__main__`, so that pickle, and with it `multiprocessing`, finds what cells define.
    """
    module = ModuleType("__main__")
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    for thing in (*_FUNCTIONS, *_EXCEPTIONS):
        namespace[thing.__name__] = thing
    namespace["answer"] = {"content": "", "ready": False}
    sys.modules["__main__"] = module
    builtins.input = _no_input
    return namespace


def _no_input(prompt: object = "", /) -> NoReturn:
    """Refuse: nobody can type into a cell."""
    raise EOFError("input() has nobody to ask: nobody can type into a cell. Use the context, or a sub-call.")
