"""What one turn may write, and what is kept beside it so that the root can still give its last answer.

Pure: no I/O, no clock.
"""

from orchestrator import prompts
from orchestrator.budget import Amounts
from orchestrator.conversation import utf8_bytes
from orchestrator.limits import (
    LAST_ANSWER_MAX_TOKENS,
    LEAST_LAST_ANSWER_MAX_TOKENS,
    LEAST_TURN_MAX_TOKENS,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
    TURN_MAX_TOKENS,
    RunLimits,
)
from orchestrator.pricing import ModelCard
from orchestrator.runs.model_calls import call_amounts, output_cost_microusd

_TURNS_PER_BUDGET = 16
"""No turn may write more than this part of the budget, so that a small one lasts for a few."""


def turn_output(card: ModelCard, limits: RunLimits, *, is_last_answer: bool) -> tuple[int, int]:
    """What the model may write in a turn, most and least, in tokens.

    Args:
        card: Of the run's model.
        limits: Of the run tree.
        is_last_answer: It is asked for nothing but its answer.
    """
    if is_last_answer:
        return LAST_ANSWER_MAX_TOKENS, LEAST_LAST_ANSWER_MAX_TOKENS
    price = card.dearest_output(0)
    affordable = (
        limits.max_cost_microusd * 1_000_000 // (_TURNS_PER_BUDGET * price) if price else TURN_MAX_TOKENS
    )
    most = min(TURN_MAX_TOKENS, limits.max_tokens // _TURNS_PER_BUDGET, affordable)
    return max(most, LEAST_TURN_MAX_TOKENS), LEAST_TURN_MAX_TOKENS


def kept_for_last_answer(
    card: ModelCard, limits: RunLimits, bound_tokens: int, output_tokens: int
) -> Amounts:
    """What the last answer needs after a turn, whose reply and report it will have to read.

    Args:
        card: Of the run's model.
        limits: Of the run tree.
        bound_tokens: Of the turn's input.
        output_tokens: What the turn may write at most.
    """
    report_tokens = min(OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES, limits.max_tokens // _TURNS_PER_BUDGET)
    answer_tokens = min(LAST_ANSWER_MAX_TOKENS, output_tokens)
    input_tokens = bound_tokens + output_tokens + report_tokens + utf8_bytes(prompts.NEWEST_REMOVED)
    return call_amounts(card, input_tokens).plus(
        Amounts(tokens=answer_tokens, cost_microusd=output_cost_microusd(card, input_tokens, answer_tokens))
    )
