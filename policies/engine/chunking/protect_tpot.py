"""Prompt tokens as far as the time per output token of what decodes allows."""

from cluster.engine_policy import ChunkPolicy


class ProtectTpot(ChunkPolicy):
    """So many prompt tokens that the step still ends in `tpot_s`, by a linear model of its time:

    step_s + decode_s x decodes + context_s x decode context + prompt_token_s x prompt tokens <= tpot_s.

    The coefficients, in seconds, are the device's own, as `deepflow profile` fits them. At least `minimum` tokens are
    taken, so prompts move where decodes alone are too slow. Without decodes it is the whole budget.
    """

    def __init__(
        self,
        tpot_s: float,
        prompt_token_s: float,
        step_s: float = 0.0,
        decode_s: float = 0.0,
        context_s: float = 0.0,
        minimum: int = 16,
    ) -> None:
        if tpot_s <= 0 or prompt_token_s <= 0 or min(step_s, decode_s, context_s) < 0:
            raise ValueError(
                f"tpot_s {tpot_s} and prompt_token_s {prompt_token_s} must be above 0; step_s {step_s}, decode_s "
                f"{decode_s} and context_s {context_s} must not be below"
            )
        if minimum < 1:
            raise ValueError(f"minimum is {minimum}: allowed are 1 prompt token per step and more")
        self._tpot_s = tpot_s
        self._prompt_token_s = prompt_token_s
        self._step_s = step_s
        self._decode_s = decode_s
        self._context_s = context_s
        self._minimum = minimum

    def prompt_tokens(self, budget: int, decodes: int, decode_context: int) -> int:
        if not decodes:
            return budget
        left_s = self._tpot_s - self._step_s - self._decode_s * decodes - self._context_s * decode_context
        return min(budget, max(self._minimum, int(left_s / self._prompt_token_s)))
