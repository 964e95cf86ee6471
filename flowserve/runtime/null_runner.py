"""A runner without a model or torch: time passes, and tokens depend on the prompt and their place alone."""

import time
from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from flowserve.core.plan import Plan, Verify
from flowserve.core.sequence import Sequence
from flowserve.core.tiers import Move
from flowserve.runtime.runner import KvHandle, Payload, StepOutput
from flowserve.runtime.wire import NullDevice

_GOLDEN, _ODD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class _Launched(NamedTuple):
    """`end_ns`: when the device will be done with it, on the monotonic clock."""

    end_ns: int
    tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


class _Decodes:
    """A decode batch: for each sequence what its tokens are made from, and the `indices` of the next ones."""

    __slots__ = ("decodes", "forced", "indices", "prompts")

    def __init__(self, decodes: tuple[Sequence, ...], tasks: "list[_Task]") -> None:
        self.decodes = decodes
        self.prompts = np.array([task.prompt for task in tasks], dtype=np.uint64)
        self.forced = [(place, task.forced) for place, task in enumerate(tasks) if task.forced]
        self.indices = np.array([s.position - s.task.request.prompt_tokens for s in decodes], dtype=np.int64)


class _Task(NamedTuple):
    prompt: int
    forced: list[int]


class NullRunner:
    """Stands in for a device where the model is not the point: one step after the other, each as long as it is told."""

    about = "no model: steps sleep, tokens are a hash of the prompt"
    kv_blocks: int | None = None

    def __init__(self, device: NullDevice) -> None:
        self._device = device
        self._payloads: dict[int, Payload] = {}
        self._tasks: dict[int, _Task] = {}
        self._decodes = _Decodes((), [])
        self._launched: deque[_Launched] = deque()
        self._free_ns = 0

    def add(self, task_id: int, payload: Payload) -> None:
        self._payloads[task_id] = payload

    def remove(self, task_id: int) -> None:
        self._payloads.pop(task_id, None)
        self._tasks.pop(task_id, None)

    def warm_up(self) -> None:
        return

    def launch(self, plan: Plan) -> None:
        self._free_ns = max(self._free_ns, time.monotonic_ns()) + round(self.step_s(plan) * 1e9)
        tokens = self._tokens(plan)[:, None]
        counts = np.ones(len(tokens), dtype=np.int64)
        if plan.verifies:
            tokens, counts = self._verify(plan.verifies, tokens, counts)
        self._launched.append(_Launched(self._free_ns, tokens, counts))

    def collect(self) -> StepOutput:
        end_ns, tokens, counts = self._launched.popleft()
        left_ns = end_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        return StepOutput(tokens, counts, {})

    def _verify(
        self, verifies: list[Verify], tokens: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Below tokens [S, 1] and counts [S] of other sequences, those that verifications yield."""
        yields = [
            self._device.acceptance.tokens(
                verify.sequence.task.request.request_id, verify.sequence.sampled, verify.draft
            )
            for verify in verifies
        ]
        found = np.zeros((len(verifies), max(yields)), dtype=np.int64)
        for row, (verify, count) in enumerate(zip(verifies, yields, strict=True)):
            task, first = self._task(verify.sequence), verify.sequence.sampled
            found[row, :count] = [self._token(task, first + place) for place in range(count)]
        above = np.pad(tokens, ((0, 0), (0, found.shape[1] - 1)))
        return np.concatenate((above, found)), np.concatenate((counts, np.array(yields, dtype=np.int64)))

    def step_s(self, plan: Plan) -> float:
        """How long the device takes."""
        prompt_tokens = plan.shape.prefill_tokens + plan.shape.draft_tokens
        return self._device.step_s + self._device.prefill_token_s * prompt_tokens

    def _tokens(self, plan: Plan) -> npt.NDArray[np.int64]:
        """[S], for those of `plan.sampling` that get one token."""
        first = [self._next(chunk.sequence) for chunk in plan.chunks if chunk.samples]
        if plan.decodes is not self._decodes.decodes:
            self._decodes = _Decodes(plan.decodes, [self._task(sequence) for sequence in plan.decodes])
        else:
            self._decodes.indices += 1
        batch = self._decodes
        tokens = self._draw(batch.prompts, batch.indices)
        for place, forced in batch.forced:
            if batch.indices[place] < len(forced):
                tokens[place] = forced[batch.indices[place]]
        return np.concatenate((np.array(first, dtype=np.int64), tokens))

    def _next(self, sequence: Sequence) -> int:
        """The token behind a prompt, or behind what a preempted sequence has computed again."""
        return self._token(self._task(sequence), sequence.position - sequence.task.request.prompt_tokens)

    def _token(self, task: _Task, index: int) -> int:
        if index < len(task.forced):
            return task.forced[index]
        return int(self._draw(np.array([task.prompt], dtype=np.uint64), np.array([index]))[0])

    def _draw(self, prompts: npt.NDArray[np.uint64], indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        bits = (prompts ^ (indices.astype(np.uint64) * np.uint64(_GOLDEN))) * np.uint64(_ODD)
        return ((bits >> np.uint64(32)) % np.uint64(self._device.vocab)).astype(np.int64)

    def _task(self, sequence: Sequence) -> _Task:
        task = self._tasks.get(sequence.task_id)
        if task is None:
            payload = self._payloads[sequence.task_id]
            text = ",".join(map(str, payload.tokens[: sequence.task.request.prompt_tokens]))
            task = self._tasks[sequence.task_id] = _Task(xxhash.xxh3_64_intdigest(text.encode()), payload.forced or [])
        return task

    @property
    def eos(self) -> tuple[int, ...]:
        return ()

    @property
    def kv_handle(self) -> KvHandle | None:
        return None

    def stage(self, blocks: list[int]) -> None:
        return

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        return 0

    def move(self, move: Move) -> None:
        time.sleep(self._device.move_block_s * len(move.source_blocks))

    def close(self) -> None:
        return
