"""A runner without a model or torch: sleeps, and yields tokens that depend on the prompt alone."""

import time
from collections import deque

import xxhash

from flowserve.core.plan import Plan
from flowserve.core.sequence import Sequence
from flowserve.runtime.runner import KvHandle, Payload, StepOutput
from flowserve.runtime.wire import NullDevice


class NullRunner:
    """Stands in for a device where the model is not the point."""

    def __init__(self, device: NullDevice) -> None:
        self._device = device
        self._payloads: dict[int, Payload] = {}
        self._prompts: dict[int, int] = {}
        self._launched: deque[Plan] = deque()

    def add(self, task_id: int, payload: Payload) -> None:
        self._payloads[task_id] = payload

    def remove(self, task_id: int) -> None:
        self._payloads.pop(task_id, None)
        self._prompts.pop(task_id, None)

    def warm_up(self) -> None:
        return

    def launch(self, plan: Plan) -> None:
        self._launched.append(plan)

    def collect(self) -> StepOutput:
        plan = self._launched.popleft()
        time.sleep(self._device.step_s + self._device.prefill_token_s * plan.shape.prefill_tokens)
        return StepOutput([[self._token(sequence)] for sequence in plan.sampling], {})

    def _token(self, sequence: Sequence) -> int:
        payload, index = self._payloads[sequence.task_id], sequence.generated
        if payload.forced is not None and index < len(payload.forced):
            return payload.forced[index]
        prompt = self._prompts.get(sequence.task_id)
        if prompt is None:
            text = ",".join(map(str, payload.tokens[: sequence.task.request.prompt_tokens]))
            prompt = self._prompts[sequence.task_id] = xxhash.xxh3_64_intdigest(text.encode())
        return xxhash.xxh3_64_intdigest(f"{prompt}:{index}".encode()) % self._device.vocab

    @property
    def eos(self) -> tuple[int, ...]:
        return ()

    @property
    def kv_handle(self) -> KvHandle | None:
        return None

    def fetch(self, source: KvHandle | None, source_blocks: list[int], blocks: list[int]) -> int:
        return 0

    def close(self) -> None:
        return
