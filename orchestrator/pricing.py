"""What model calls cost. Integer micro-dollars, rounded up; floating point never touches money.

A price is whole micro-dollars for a million tokens, which is the unit providers publish in: 0.10 $/MTok is
100_000. A call is billed as a whole at the tier its input falls in (Anthropic's long-context pricing: the
tier applies to the request, not to the tokens past its edge).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_MTOK = 1_000_000


def whole_microusd(tokens_times_price: int) -> int:
    """Tokens times their price per million, in whole micro-dollars, rounded up."""
    return -(-tokens_times_price // _MTOK)


class Usage(NamedTuple):
    """Tokens of one model call, as its provider counted them. The four never overlap."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """All tokens; what token limits count."""
        return self.input + self.cache_read + self.cache_write + self.output

    @property
    def total_input(self) -> int:
        """What decides the price tier."""
        return self.input + self.cache_read + self.cache_write

    def plus(self, other: "Usage") -> "Usage":
        """The sum, counter by counter."""
        return Usage(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Prices, in micro-dollars for a million tokens, of requests up to a size."""

    up_to_input_tokens: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    """For the cache lifetime we ask for (5 minutes)."""

    def cost_microusd(self, usage: Usage) -> int:
        """The bill of one call of this tier, rounded up once."""
        total = (
            usage.input * self.input
            + usage.cache_read * self.cache_read
            + usage.cache_write * self.cache_write
            + usage.output * self.output
        )
        return whole_microusd(total)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What we know of one model."""

    name: str
    window_tokens: int
    """Input and output together."""
    max_output_tokens: int
    tiers: tuple[Tier, ...]
    """By rising `up_to_input_tokens`; the last one covers the window."""

    def cost_microusd(self, usage: Usage) -> int:
        """What a call with this usage is billed."""
        for tier in self.tiers:
            if usage.total_input <= tier.up_to_input_tokens:
                return tier.cost_microusd(usage)
        return self.tiers[-1].cost_microusd(usage)

    def reachable_tiers(self, input_bound_tokens: int) -> Sequence[Tier]:
        """The tiers a request of at most so many input tokens can be billed at."""
        reachable = []
        for tier in self.tiers:
            reachable.append(tier)
            if input_bound_tokens <= tier.up_to_input_tokens:
                break
        return reachable

    def dearest_input(self, input_bound_tokens: int) -> int:
        """The highest price an input token of such a request can have, cached or not."""
        tiers = self.reachable_tiers(input_bound_tokens)
        return max(max(tier.input, tier.cache_read, tier.cache_write) for tier in tiers)

    def dearest_output(self, input_bound_tokens: int) -> int:
        """The highest price an output token of such a request can have."""
        return max(tier.output for tier in self.reachable_tiers(input_bound_tokens))


def free_model(name: str, *, window_tokens: int, max_output_tokens: int) -> ModelCard:
    """A card for a model that costs nothing: a scripted one, or a local one the user priced at 0."""
    tier = Tier(up_to_input_tokens=window_tokens, input=0, output=0, cache_read=0, cache_write=0)
    return ModelCard(
        name=name, window_tokens=window_tokens, max_output_tokens=max_output_tokens, tiers=(tier,)
    )
