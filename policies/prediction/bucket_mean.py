"""Predicts output lengths from finished requests with prompts of similar length."""

from cluster.request import Request


class BucketMean:
    """Running mean of output lengths per power of two of the prompt length, rounded to the middle of 128-token buckets.

    The paper's predictor is a small classifier over the same buckets (DeepServe 5.3.3); this stand-in needs no model.
    Until a prompt length was seen it answers `prior_tokens`. `weight` of the newest observation once there are many.
    """

    BUCKET_TOKENS = 128

    def __init__(self, prior_tokens: int = 192, weight: float = 0.02) -> None:
        if prior_tokens < 1 or not 0 < weight <= 1:
            raise ValueError(
                f"prediction: prior_tokens is {prior_tokens}, weight is {weight}: "
                "allowed are prior_tokens from 1 and a weight above 0 up to 1"
            )
        self._prior = prior_tokens
        self._weight = weight
        self._seen: dict[int, tuple[int, float]] = {}

    def predict(self, request: Request) -> int:
        """Expected output tokens, at most the client's limit."""
        _, mean = self._seen.get(request.prompt_tokens.bit_length(), (0, float(self._prior)))
        middle = int(mean // self.BUCKET_TOKENS) * self.BUCKET_TOKENS + self.BUCKET_TOKENS // 2
        return min(middle, request.max_tokens)

    def observe(self, request: Request, output_tokens: int) -> None:
        """A request finished with so many tokens."""
        key = request.prompt_tokens.bit_length()
        count, mean = self._seen.get(key, (0, 0.0))
        weight = max(self._weight, 1 / (count + 1))
        self._seen[key] = (count + 1, mean + weight * (output_tokens - mean))
