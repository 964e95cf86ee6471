"""How the tokens of a request are drawn and where its output ends: what a client may ask for."""

import msgspec

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Settings of one request; the default is greedy decoding to the model's end-of-sequence token.

    Applied in this order to the logits of one token, before it is drawn with a seed per request: `repetition_penalty`
    (tokens of prompt and output: positive logits divided by it, negative ones multiplied; Keskar et al. 2019),
    `frequency_penalty` times the number of a token's occurrences in the output and `presence_penalty` for those that
    occur subtracted (OpenAI's meaning), `logit_bias` by token id added, `temperature` (0: the most likely token),
    `top_k` most likely tokens kept (0: all), of these the fewest with a probability of `top_p` together, of these the
    ones at least `min_p` times as likely as the most likely.

    `stop`: strings that end the output, which then has none of them; looked for where text is made.
    `stop_token_ids`: tokens that end it, beside the model's end-of-sequence tokens unless `ignore_eos`. None of the two
    is drawn before `min_tokens` of output. `logprobs`: report each token's logarithm of probability, and those of this
    many most likely tokens, by the model alone.
    The client's limit of tokens is in the request, because schedulers may know it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, allowed, fine in (
            ("temperature", "0 (greedy) to 100", 0 <= self.temperature <= 100),
            ("top_k", "0 (all tokens) or a number of tokens from 1 up", self.top_k >= 0),
            ("top_p", "above 0 to 1 (all tokens)", 0 < self.top_p <= 1),
            ("min_p", "0 (all tokens) to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "0.01 to 100, 1 for none", 0.01 <= self.repetition_penalty <= 100),
            ("presence_penalty", "-2 to 2, 0 for none", -2 <= self.presence_penalty <= 2),
            ("frequency_penalty", "-2 to 2, 0 for none", -2 <= self.frequency_penalty <= 2),
            ("seed", f"0 to {MAX_SEED}", 0 <= self.seed <= MAX_SEED),
            ("logprobs", f"null or 0 to {MAX_LOGPROBS}", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS),
            ("stop", "strings that are not empty", all(self.stop)),
            ("stop_token_ids", "token ids from 0 up", min(self.stop_token_ids, default=0) >= 0),
            ("min_tokens", "0 or more", self.min_tokens >= 0),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed are {allowed}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias of token {token} is {bias}: allowed are -100 to 100, for token ids from 0 up"
                )

    def for_request(self, request_id: int) -> "Sampling":
        """The same with a seed of the request's own."""
        return msgspec.structs.replace(self, seed=(self.seed + request_id) % (MAX_SEED + 1))

    def check(self, vocab_size: int, max_tokens: int | None = None) -> None:
        """ValueError: token ids that the model does not have, or more `min_tokens` than the request's limit."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"{name} has token {max(ids)}: the model's vocabulary is 0 to {vocab_size - 1}")
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}: allowed is at most max_tokens, {max_tokens}")

    @property
    def penalises(self) -> bool:
        """Logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
