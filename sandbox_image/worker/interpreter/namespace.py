"""The module that cells run in."""

import builtins
import sys
from types import ModuleType
from typing import Any, NoReturn

from sandbox_image.worker.interpreter import errors, names

_FUNCTIONS = {
    "llm_query": names.llm_query,
    "llm_query_batched": names.llm_query_batched,
    "llm_query_as_completed": names.llm_query_as_completed,
    "rlm_query": names.rlm_query,
    "rlm_query_batched": names.rlm_query_batched,
    "rlm_query_as_completed": names.rlm_query_as_completed,
    "allm_query": names.allm_query,
    "allm_query_batched": names.allm_query_batched,
    "allm_query_as_completed": names.allm_query_as_completed,
    "arlm_query": names.arlm_query,
    "arlm_query_batched": names.arlm_query_batched,
    "arlm_query_as_completed": names.arlm_query_as_completed,
    "budget": names.budget,
    "FINAL": names.FINAL,
    "FINAL_VAR": names.FINAL_VAR,
    "SHOW_VARS": names.SHOW_VARS,
}

_EXCEPTIONS = {error.__name__: error for error in errors.BY_REASON.values()}


def make_namespace() -> dict[str, Any]:
    """A fresh `__main__` with the names of the guest library; `context` joins them at the lease.

    It takes the place of the real `__main__`, so that pickle, and with it `multiprocessing`, finds what
    cells define.
    """
    module = ModuleType("__main__")
    namespace = module.__dict__
    namespace["__builtins__"] = builtins
    namespace |= {**_FUNCTIONS, **_EXCEPTIONS}
    namespace["answer"] = {"content": "", "ready": False}
    sys.modules["__main__"] = module
    builtins.input = _no_input
    return namespace


def _no_input(prompt: object = "", /) -> NoReturn:
    """Refuse: nobody can type into a cell."""
    raise EOFError("input() has nobody to ask: nobody can type into a cell. Use the context, or a sub-call.")
