"""The frontend: holds the tokens of open requests, beside the control plane, so that a retry goes on where it broke."""

from collections.abc import Iterable
from typing import NamedTuple

from cluster.request import Answer, Request, Task
from cluster.tokens import answer_tokens_of, prompt_tokens_of
from flowserve.runtime.runner import Payload, TokenLogprobs
from flowserve.runtime.sampling import Sampling


class ClientPrompt(NamedTuple):
    """What a client sent: the tokens of its prompt, and how it wants the answer."""

    tokens: list[int]
    sampling: Sampling


class NewTokens(NamedTuple):
    """What a request's output got in one turn of its engine. `logprobs`: one for each token, where they were asked for.

    `ended`: the last token ends the output, by the model's will or as one of the request's stop tokens.
    """

    request_id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    ended: bool = False


class _Open(NamedTuple):
    prompt: list[int]
    sampling: Sampling
    answer: Answer | None
    forced: list[int] | None


class Frontend:
    """Prompts and tokens by request. `sampling`: of requests that bring none of their own. `keep`: remember the outputs
    of ended requests too.
    """

    def __init__(self, vocab: int, sampling: Sampling, keep: bool = False) -> None:
        self.outputs: dict[int, list[int]] = {}
        self._vocab = vocab
        self._sampling = sampling
        self._keep = keep
        self._open: dict[int, _Open] = {}
        self._request_of: dict[int, int] = {}

    def open(self, request: Request, answer: Answer | None, prompt: ClientPrompt | None = None) -> None:
        """A request arrives. Without a prompt of a client, one is made from its block identities, to get `answer`."""
        number = request.request_id
        if prompt is not None:
            self._open[number] = _Open(*prompt, answer, None)
        elif answer is not None:
            tokens = prompt_tokens_of(request, self._vocab, answer)
            forced = answer_tokens_of(request, answer, self._vocab)
            self._open[number] = _Open(tokens, self._sampling.for_request(number), answer, forced)
        else:
            raise ValueError(f"request {number} has neither a prompt nor an answer: there is nothing to compute")
        self.outputs[number] = []

    def payload(self, task: Task) -> Payload:
        """What the executor of this task must have: prompt, the tokens so far, and the sampler's orders."""
        number = task.request.request_id
        request = self._open[number]
        self._request_of[task.task_id] = number
        return Payload(
            tokens=request.prompt + self.outputs[number][: task.generated],
            sampling=request.sampling,
            answer=request.answer,
            forced=request.forced,
            generated=task.generated,
        )

    def take(self, tokens: Iterable[tuple[int, int, int]], new: dict[int, NewTokens] | None = None) -> None:
        """Tokens arrive as (task id, place in the request's output, token). Out of order means lost or repeated: a bug.

        Those of tasks that are not a request's current one are dropped; the others are put in `new`, by task id.
        """
        request_of, outputs = self._request_of, self.outputs
        for task_id, index, token in tokens:
            number = request_of.get(task_id)
            if number is not None:
                output = outputs[number]
                assert index == len(output), f"request {number}: token {index} came after {len(output)} tokens"
                output.append(token)
                if new is not None:
                    new.setdefault(task_id, NewTokens(number, [], [])).tokens.append(token)

    def generated(self, request_id: int) -> int:
        """Tokens held for an open request."""
        return len(self.outputs[request_id])

    def close_task(self, task_id: int) -> None:
        """No more tokens are taken from this task."""
        self._request_of.pop(task_id, None)

    def close(self, request_id: int) -> None:
        """The request has ended."""
        del self._open[request_id]
        if not self._keep:
            del self.outputs[request_id]
