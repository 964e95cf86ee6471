"""How many draft tokens a speculating engine gets right, where no model says it: on the sampler's side alone."""

import msgspec
import xxhash

_WHOLE = float(1 << 64)


class Acceptance(msgspec.Struct, frozen=True):
    """Each output token of a request is guessed right with probability `rate`, independently of all others.

    Whether it is depends on seed, request and output index alone, not on the step that guesses it, so every backend
    and every schedule draws the same. A verification of k drafts then yields (1 - rate^(k+1)) / (1 - rate) tokens on
    average (Leviathan et al., arXiv 2211.17192, equation 1).
    """

    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"acceptance rate is {self.rate}: allowed is a probability from 0 to 1")

    def tokens(self, request_id: int, generated: int, draft: int) -> int:
        """Tokens that verifying `draft` guesses behind `generated` output tokens yields: 1 to draft + 1."""
        right = 0
        while right < draft and self._right(request_id, generated + right):
            right += 1
        return right + 1

    def _right(self, request_id: int, index: int) -> bool:
        drawn = xxhash.xxh3_64_intdigest(f"{self.seed}:{request_id}:{index}".encode())
        return drawn < self.rate * _WHOLE
