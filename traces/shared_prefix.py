"""A made-up workload whose prompts begin alike: so many system prompts, a question of one's own behind each."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster import identity
from cluster.request import Answer, Arrival, Request
from cluster.streams import stream
from cluster.vocabulary import BLOCK_TOKENS, NS_PER_S, to_ns
from traces.errors import require


@dataclass(frozen=True, slots=True)
class SharedPrefixTrace:
    """Poisson arrivals at `rate` requests/s for `duration_s`. Each prompt is one of `families` prefixes, of
    `prefix_tokens`, and 1 to 2 x `own_tokens` - 1 tokens that nobody shares; outputs have 1 to 2 x `output_tokens` - 1.

    Family n is asked for in proportion to 1 / n (Zipf). The same arguments give the same workload. ValueError: a number
    out of range.
    """

    model: str
    rate: float = 10.0
    duration_s: float = 600.0
    families: int = 12
    prefix_tokens: int = 96
    own_tokens: int = 32
    output_tokens: int = 20
    seed: int = 0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("rate", "duration_s", "families", "own_tokens", "output_tokens"):
            value = getattr(self, name)
            require(value > 0, name, value, "more than 0", "raise it")
        wanted = f"a multiple of {BLOCK_TOKENS} tokens, which is what caches share"
        require(self.prefix_tokens % BLOCK_TOKENS == 0, "prefix_tokens", self.prefix_tokens, wanted, "round it")

    def __iter__(self) -> Iterator[Arrival]:
        rng = stream(self.seed, "shared prefixes")
        weights = 1 / (1 + rng.permutation(self.families))
        salt, at_ns, number = identity.salt(self.model), 0, 0
        while (at_ns := at_ns + round(rng.exponential(NS_PER_S / self.rate))) < to_ns(self.duration_s):
            family = int(rng.choice(self.families, p=weights / weights.sum()))
            shared = (f"family {family}, block {block}" for block in range(self.prefix_tokens // BLOCK_TOKENS))
            ids = identity.from_trace(shared, BLOCK_TOKENS, self.prefix_tokens, salt)
            prompt = self.prefix_tokens + int(rng.integers(1, 2 * self.own_tokens))
            own = identity.unique(number)[len(ids) : prompt // BLOCK_TOKENS]
            output = int(rng.integers(1, 2 * self.output_tokens))
            request = Request(number, prompt, max(self.max_tokens, output), self.model, (*ids, *own))
            yield Arrival(request, Answer(output), at_ns)
            number += 1
