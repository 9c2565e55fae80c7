"""The functions a cell finds in its namespace.

They are plain functions of a real module, so that help(), tracebacks and pickle work on them as on any
other; what they need of the process is in `_run`, set once by `connect`.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from sandbox_image.worker.interpreter import as_completed, calls
from sandbox_image.worker.interpreter.batch import Batch
from sandbox_image.worker.interpreter.child_context import place_context
from sandbox_image.worker.interpreter.errors import InvalidRequest
from sandbox_image.worker.interpreter.final import FinalAnswer, RunEnded, look_up
from sandbox_image.worker.interpreter.link import CallLink
from sandbox_image.worker.interpreter.staged import OwnContext
from sandbox_image.worker.interpreter.variables import describe_variables

OnError = Literal["raise", "return"]


class Run(NamedTuple):
    """What the functions below stand on."""

    link: CallLink
    final: FinalAnswer
    namespace: dict[str, Any]
    preset: frozenset[str]
    own: OwnContext
    max_prompt_bytes: int


_run: Run


def connect(run: Run) -> None:
    """Give the functions of this module their run. There is one to a process."""
    global _run  # noqa: PLW0603 - a process serves one run, and cells call plain functions
    _run = run


def llm_query(prompt: str, *, model: str | None = None, max_tokens: int | None = None) -> str:
    """Ask a language model, and get its answer as text.

    The model sees `prompt` and nothing else: put the piece of text it should read into it. For several
    prompts use llm_query_batched, which runs them side by side.

    Args:
        prompt: What to send.
        model: A model name of this run; the default is its sub-call model.
        max_tokens: The most it may write. The answer has `.truncated` set when it stopped there.

    Raises:
        BudgetExceeded: Too little is left; it has .account, .wanted and .left.
        SubCallError: Anything else; ModelFailed, ModelNotAllowed, InvalidRequest and others derive from it.
    """
    answer: str = _only(_wait(_completions([prompt], model, max_tokens)))
    return answer


def llm_query_batched(
    prompts: Iterable[str],
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> list[str]:
    """Ask a language model many things side by side. Answers come in the order of the prompts.

    Args:
        prompts: What to send; each is a call of its own.
        model: As in llm_query.
        max_tokens: As in llm_query, for each call.
        on_error: "raise" starts no more calls after one fails, waits for those under way, and raises the
            first error by position. "return" puts the exception object in the place of the answer.

    Raises:
        SubCallError: As llm_query does, with on_error="raise".
    """
    return _settle(_wait(_completions(prompts, model, max_tokens, on_error)), on_error)


def llm_query_as_completed(
    prompts: Iterable[str],
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> Iterator[tuple[int, Any]]:
    """Ask a language model many things side by side, and take the answers one by one as they come.

        for index, answer in llm_query_as_completed(prompts): ...

    Memory holds few prompts and answers at a time: `prompts` may be a generator of any length, and is drawn
    from as answers are taken. Leaving the loop gives up what has not been answered.

    Args:
        prompts: What to send; each is a call of its own. Those of a list are sent faster where they begin
            alike, because their common beginning is cached.
        model: As in llm_query.
        max_tokens: As in llm_query, for each call.
        on_error: "raise" raises the first error that comes, and gives up the other calls. "return" yields the
            exception object in the place of the answer.

    Yields:
        The prompt's position in `prompts`, from 0, and its answer.

    Raises:
        SubCallError: As llm_query does, with on_error="raise".
    """
    steps, leader_first = _completions_as_drawn(prompts, model, max_tokens)
    return as_completed.results(
        _run.link, steps, stop_early=_stops_early(on_error), leader_first=leader_first
    )


def rlm_query(question: str, context: Any = None, *, max_tokens: int | None = None) -> str:
    """Have a question answered by a child run: a model with a sandbox and a `context` of its own.

    Worth its price where the answer takes several steps over more text than one prompt holds.

    Args:
        question: What to find out.
        context: What the child sees as `context`: text, a dict of path to text, a list of texts; or our own
            `context` or a part of it (`context[a:b]` of a large text, a file, some files), which is not
            copied. Left out, the question is the context too.
        max_tokens: A token limit for the child alone, below what this run has left.

    Raises:
        DepthExceeded: This run may not start child runs.
        ChildRunFailed: The child ended without an answer.
        SubCallError: As llm_query does.
    """
    answer: str = _only(_wait(_child_runs([(question, context)], max_tokens)))
    return answer


def rlm_query_batched(
    questions: Iterable[Any],
    contexts: Iterable[Any] | None = None,
    *,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> list[str]:
    """Start child runs side by side. Answers come in the order of the questions.

    Args:
        questions: One question for each run; or, without `contexts`, (question, context) pairs.
        contexts: One context for each question, as in rlm_query.
        max_tokens: A token limit for each child.
        on_error: As in llm_query_batched.

    Raises:
        SubCallError: As rlm_query does, with on_error="raise".
    """
    return _settle(_wait(_child_runs(_pairs(questions, contexts), max_tokens, on_error)), on_error)


def rlm_query_as_completed(
    questions: Iterable[Any],
    contexts: Iterable[Any] | None = None,
    *,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> Iterator[tuple[int, Any]]:
    """Start child runs side by side, and take their answers one by one as they come.

    Leaving the loop ends the child runs that have not answered.

    Args:
        questions: As in rlm_query_batched; may be a generator.
        contexts: As in rlm_query_batched; may be one too.
        max_tokens: A token limit for each child.
        on_error: As in llm_query_as_completed.

    Yields:
        The question's position in `questions`, from 0, and its answer.

    Raises:
        SubCallError: As rlm_query does, with on_error="raise".
    """
    steps = _child_runs_as_drawn(questions, contexts, max_tokens)
    return as_completed.results(_run.link, steps, stop_early=_stops_early(on_error))


async def allm_query(prompt: str, *, model: str | None = None, max_tokens: int | None = None) -> str:
    """llm_query for `await`, alone or in asyncio.gather."""
    answer: str = _only(await _wait_async(_completions([prompt], model, max_tokens)))
    return answer


async def allm_query_batched(
    prompts: Iterable[str],
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> list[str]:
    """llm_query_batched for `await`."""
    return _settle(await _wait_async(_completions(prompts, model, max_tokens, on_error)), on_error)


def allm_query_as_completed(
    prompts: Iterable[str],
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> AsyncIterator[tuple[int, Any]]:
    """llm_query_as_completed for `async for`."""
    steps, leader_first = _completions_as_drawn(prompts, model, max_tokens)
    return as_completed.results_async(
        _run.link, steps, stop_early=_stops_early(on_error), leader_first=leader_first
    )


async def arlm_query(question: str, context: Any = None, *, max_tokens: int | None = None) -> str:
    """rlm_query for `await`, alone or in asyncio.gather."""
    answer: str = _only(await _wait_async(_child_runs([(question, context)], max_tokens)))
    return answer


async def arlm_query_batched(
    questions: Iterable[Any],
    contexts: Iterable[Any] | None = None,
    *,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> list[str]:
    """rlm_query_batched for `await`."""
    return _settle(
        await _wait_async(_child_runs(_pairs(questions, contexts), max_tokens, on_error)), on_error
    )


def arlm_query_as_completed(
    questions: Iterable[Any],
    contexts: Iterable[Any] | None = None,
    *,
    max_tokens: int | None = None,
    on_error: OnError = "raise",
) -> AsyncIterator[tuple[int, Any]]:
    """rlm_query_as_completed for `async for`."""
    steps = _child_runs_as_drawn(questions, contexts, max_tokens)
    return as_completed.results_async(_run.link, steps, stop_early=_stops_early(on_error))


def budget() -> dict[str, Any]:
    """What is left: tokens, cost_microusd, calls, child_runs (None = unlimited), levels_below, deadline_s."""
    left: dict[str, Any] = _only(_wait(Batch(_run.link, [calls.budget()], 1, stop_early=True)))
    return left


def FINAL(value: Any) -> NoReturn:  # noqa: N802 - the reference library's name
    """End the run with `value` as its answer. Text is taken as it is, anything else as JSON.

    Leaves the cell at once. The first answer counts.

    Raises:
        TypeError: JSON cannot hold the value; the run goes on.
        ValueError: It is longer than this run allows; the run goes on.
    """
    _run.final.offer(value)
    raise RunEnded


def FINAL_VAR(name: str) -> NoReturn:  # noqa: N802 - the reference library's name
    """End the run with the value of the variable called `name`. As FINAL, for values too long to write out.

    Raises:
        NameError: There is no such variable; the run goes on.
    """
    FINAL(look_up(name, _run.namespace))


def SHOW_VARS() -> str:  # noqa: N802 - the reference library's name
    """Names, types and sizes of the variables that cells have made."""
    return describe_variables(_run.namespace, _run.preset)


def _completions(
    prompts: Iterable[Any], model: str | None, max_tokens: int | None, on_error: OnError = "raise"
) -> Batch:
    _refuse_one_prompt(prompts, "llm_query_batched")
    checked = [_checked_text(prompt, "a prompt") for prompt in prompts]
    shared = calls.shared_prefix_bytes(checked)
    steps = (calls.complete(prompt, model, max_tokens, shared) for prompt in checked)
    return Batch(_run.link, steps, len(checked), _stops_early(on_error), leader_first=shared > 0)


def _completions_as_drawn(
    prompts: Iterable[Any], model: str | None, max_tokens: int | None
) -> tuple[Iterator[calls.Steps[str]], bool]:
    """The calls, none of them made before it is drawn, and whether the first should go alone."""
    _refuse_one_prompt(prompts, "llm_query_as_completed")
    # Of what is still to be generated nobody knows how it begins.
    shared = calls.shared_prefix_bytes(prompts) if isinstance(prompts, list | tuple) else 0
    checked = (_checked_text(prompt, "a prompt") for prompt in prompts)
    return (calls.complete(prompt, model, max_tokens, shared) for prompt in checked), shared > 0


def _refuse_one_prompt(prompts: Iterable[Any], function: str) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"{function} takes a list of prompts; for one prompt use llm_query")


def _child_runs(
    pairs: Iterable[tuple[Any, Any]], max_tokens: int | None, on_error: OnError = "raise"
) -> Batch:
    checked = [(_checked_text(question, "a question"), context) for question, context in pairs]
    # All are looked at before the first is started: a context of a wrong type is the caller's mistake.
    places = [(question, place_context(context, question, _run.own)) for question, context in checked]
    steps = (calls.child_run(question, place, max_tokens) for question, place in places)
    return Batch(_run.link, steps, len(places), _stops_early(on_error))


def _child_runs_as_drawn(
    questions: Iterable[Any], contexts: Iterable[Any] | None, max_tokens: int | None
) -> Iterator[calls.Steps[str]]:
    return (
        calls.child_run(
            _checked_text(question, "a question"), place_context(context, question, _run.own), max_tokens
        )
        for question, context in _pairs(questions, contexts)
    )


def _pairs(questions: Iterable[Any], contexts: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """(question, context), drawn one by one.

    Raises:
        ValueError: There are more of one than of the other, at once or, of a generator, in the end.
    """
    if isinstance(questions, str):
        raise TypeError("this takes a list of questions; for one question use rlm_query")
    if contexts is None:
        return (one if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in questions)
    if isinstance(contexts, str | Mapping):
        raise TypeError("contexts is a list with one context for each question")
    if isinstance(questions, list | tuple) and isinstance(contexts, list | tuple):
        counts = len(questions), len(contexts)
        if counts[0] != counts[1]:
            raise ValueError(f"{counts[0]} questions and {counts[1]} contexts; there must be one for each")
    return zip(questions, contexts, strict=True)


def _checked_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} is a str, not {type(text).__name__}")
    # Only a text that might be too long is encoded to find out.
    if len(text) * 4 > _run.max_prompt_bytes:
        length_bytes = len(calls.encode(text))
        if length_bytes > _run.max_prompt_bytes:
            raise InvalidRequest(
                f"{what} of {length_bytes:,} bytes; this run allows {_run.max_prompt_bytes:,}"
            )
    return text


def _stops_early(on_error: OnError) -> bool:
    if on_error not in ("raise", "return"):
        raise ValueError(f'on_error is "raise" or "return", not {on_error!r}')
    return on_error == "raise"


def _wait(batch: Batch) -> list[Any]:
    try:
        batch.start()
        return batch.results.result()
    except BaseException:
        # An interrupt: nobody will read what is still under way.
        batch.cancel()
        raise


async def _wait_async(batch: Batch) -> list[Any]:
    from asyncio import wrap_future  # noqa: PLC0415 - whoever awaits has it loaded; the others need not

    batch.start()
    return await wrap_future(batch.results)


def _settle(results: list[Any], on_error: OnError) -> list[Any]:
    if on_error == "raise":
        for result in results:
            if isinstance(result, Exception):
                raise result
    return results


def _only(results: list[Any]) -> Any:
    return _settle(results, "raise")[0]
