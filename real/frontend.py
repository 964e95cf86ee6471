"""The frontend: holds the tokens of open requests, beside the control plane, so that a retry goes on where it broke."""

from collections.abc import Iterable

from cluster.request import Answer, Request, Task
from cluster.tokens import answer_tokens_of, prompt_tokens_of
from flowserve.runtime.runner import Payload
from flowserve.runtime.sampling import Sampling


class Frontend:
    """Prompts and tokens by request. `keep`: remember the outputs of ended requests too."""

    def __init__(self, vocab: int, sampling: Sampling, keep: bool = False) -> None:
        self.outputs: dict[int, list[int]] = {}
        self._vocab = vocab
        self._sampling = sampling
        self._keep = keep
        self._answers: dict[int, Answer] = {}
        self._prompts: dict[int, list[int]] = {}
        self._forced: dict[int, list[int] | None] = {}
        self._request_of: dict[int, int] = {}

    def open(self, request: Request, answer: Answer) -> None:
        """A request arrives; its prompt is made from its block identities."""
        number = request.request_id
        self._answers[number] = answer
        self._prompts[number] = prompt_tokens_of(request, self._vocab, answer)
        self._forced[number] = answer_tokens_of(request, answer, self._vocab)
        self.outputs[number] = []

    def payload(self, task: Task) -> Payload:
        """What the executor of this task must have: prompt, the tokens so far, and the sampler's orders."""
        number = task.request.request_id
        output = self.outputs[number]
        self._request_of[task.task_id] = number
        return Payload(
            tokens=self._prompts[number] + output[: task.generated],
            sampling=self._sampling.for_request(number),
            answer=self._answers[number],
            forced=self._forced[number],
            generated=task.generated,
        )

    def take(self, tokens: Iterable[tuple[int, int, int]]) -> None:
        """Tokens arrive as (task id, place in the request's output, token). Out of order means lost or repeated: a bug.

        Those of tasks that are not a request's current one are dropped.
        """
        request_of, outputs = self._request_of, self.outputs
        for task_id, index, token in tokens:
            number = request_of.get(task_id)
            if number is not None:
                output = outputs[number]
                assert index == len(output), f"request {number}: token {index} came after {len(output)} tokens"
                output.append(token)

    def generated(self, request_id: int) -> int:
        """Tokens held for an open request."""
        return len(self.outputs[request_id])

    def close_task(self, task_id: int) -> None:
        """No more tokens are taken from this task."""
        self._request_of.pop(task_id, None)

    def close(self, request_id: int) -> None:
        """The request has ended."""
        del self._answers[request_id], self._prompts[request_id], self._forced[request_id]
        if not self._keep:
            del self.outputs[request_id]
