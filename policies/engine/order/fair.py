"""Fair between tenants: the virtual token counter."""

from collections import deque

from cluster.engine_policy import EngineSequence, QueueOrder


class _Tenant:
    """`served`: the counter without what `decoding` sequences got since they joined, at steps that add to `joined`."""

    __slots__ = ("decoding", "joined", "served", "waiting")

    def __init__(self) -> None:
        self.served = 0.0
        self.decoding = 0
        self.joined = 0
        self.waiting: deque[EngineSequence] = deque()


class Fair(QueueOrder):
    """VTC (Sheng et al., arXiv 2401.00588): the tenant that was served least so far is admitted next.

    Service is counted in tokens: `prompt_weight` for each prompt token that is computed (cached ones are free, and so
    is what a preemption computes again), `output_weight` for each output token, as it is decoded. A tenant that comes
    back after a pause is lifted to the least served of those that wait, or to the last that did, so that idle time
    earns no credit. Within a tenant it is first come, first served.
    """

    moves_with_service = True

    def __init__(self, prompt_weight: float = 1.0, output_weight: float = 2.0) -> None:
        super().__init__()
        if prompt_weight < 0 or output_weight < 0 or prompt_weight + output_weight == 0:
            raise ValueError(
                f"prompt_weight is {prompt_weight} and output_weight {output_weight}: allowed are weights from 0 up, "
                "not both 0"
            )
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[str, _Tenant] = {}
        self._last = _Tenant()
        self._head = self._last

    def push(self, sequence: EngineSequence, steps: int) -> None:
        name = sequence.task.request.tenant
        tenant = self._tenants.setdefault(name, _Tenant())
        if not tenant.waiting:
            if not sequence.preemptions:
                others = [self._counter(other, steps) for other in self._waiting.values()]
                floor = min(others) if others else self._counter(self._last, steps)
                tenant.served += max(0.0, floor - self._counter(tenant, steps))
            self._waiting[name] = tenant
        if sequence.preemptions:
            tenant.waiting.appendleft(sequence)
        else:
            tenant.waiting.append(sequence)

    def head(self, steps: int) -> EngineSequence | None:
        if not self._waiting:
            return None
        self._head = min(
            self._waiting.values(), key=lambda tenant: (self._counter(tenant, steps), tenant.waiting[0].arrival)
        )
        return self._head.waiting[0]

    def pop(self) -> None:
        sequence = self._head.waiting.popleft()
        if not self._head.waiting:
            del self._waiting[sequence.task.request.tenant]
            self._last = self._head

    def admitted(self, sequence: EngineSequence, tokens: int) -> None:
        if not sequence.preemptions:
            self._tenants[sequence.task.request.tenant].served += self._prompt_weight * tokens

    def joined(self, sequence: EngineSequence, steps: int) -> None:
        tenant = self._tenants[sequence.task.request.tenant]
        tenant.decoding += 1
        tenant.joined += steps

    def left(self, sequence: EngineSequence, steps: int) -> None:
        tenant = self._tenants[sequence.task.request.tenant]
        tenant.served = self._counter(tenant, steps)
        tenant.decoding -= 1
        # What stays decodes on from its own step: the sum is set so that the counter goes on from here.
        tenant.joined = tenant.decoding * steps

    def verified(self, sequence: EngineSequence, tokens: int) -> None:
        self._tenants[sequence.task.request.tenant].served += self._output_weight * tokens

    def _counter(self, tenant: _Tenant, steps: int) -> float:
        return tenant.served + self._output_weight * (tenant.decoding * steps - tenant.joined)
