import dataclasses

from orchestrator import limits
from orchestrator.limits import RunLimits


def test_every_limit_of_a_run_has_a_default_that_allows_something() -> None:
    assert all(getattr(RunLimits(), item.name) > 0 for item in dataclasses.fields(RunLimits))


def test_a_prompt_and_an_inline_context_fit_into_a_message_with_room_for_their_frame() -> None:
    frame_bytes = 64 * 1024
    assert limits.MAX_PROMPT_BYTES + frame_bytes <= limits.MAX_MESSAGE_BYTES
    assert limits.MAX_INLINE_CONTEXT_BYTES + frame_bytes <= limits.MAX_MESSAGE_BYTES
    assert limits.ANSWER_CHUNK_BYTES + frame_bytes <= limits.MAX_MESSAGE_BYTES
    assert limits.MAX_OUTPUT_CHUNK_BYTES + frame_bytes <= limits.MAX_MESSAGE_BYTES


def test_the_end_of_a_cell_fits_into_a_message() -> None:
    names_bytes = limits.MAX_VARIABLES * (limits.MAX_VARIABLE_NAME_BYTES + 4)
    assert limits.MAX_TRACEBACK_BYTES + names_bytes < limits.MAX_MESSAGE_BYTES


def test_what_may_shrink_has_a_least_that_is_no_more_than_its_default() -> None:
    assert limits.LEAST_SUB_CALL_MAX_TOKENS <= limits.DEFAULT_SUB_CALL_MAX_TOKENS
    assert limits.LEAST_TURN_MAX_TOKENS <= limits.TURN_MAX_TOKENS


def test_a_cell_is_given_up_only_after_all_its_ordinary_limits() -> None:
    run = RunLimits()
    assert run.cell_timeout_s <= run.cell_ceiling_s <= run.deadline_s
