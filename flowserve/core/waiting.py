"""Who waits for a place in the batch of one engine."""

import heapq

from cluster.engine_policy import QueueOrder
from flowserve.core.sequence import WAITING, Sequence


class Waiting:
    """Sequences in the queue, whose next one is the queue order's to say, and `in_place`: decode tasks that wait for a
    place and for nothing else, because their KV cache is here.

    `count`: how many wait, `tokens` of context together. Who is aborted, or went ahead of the queue, leaves it when it
    comes to its head.
    """

    __slots__ = ("_decode_tasks", "_order", "_passed", "count", "in_place", "tokens")

    def __init__(self, order: QueueOrder) -> None:
        self.count = 0
        self.tokens = 0
        self.in_place: dict[int, Sequence] = {}
        self._order = order
        # Decode tasks in the queue by the age of their requests, some of which wait no more; those that went ahead of
        # the queue, which has them still.
        self._decode_tasks: list[tuple[int, int, Sequence]] = []
        self._passed: set[int] = set()

    def add(self, sequence: Sequence, steps: int) -> None:
        """To the queue: it is new or was preempted. `steps`: the engine's decode clock."""
        self._count(sequence)
        if sequence.task_id in self._passed:
            self._passed.remove(sequence.task_id)  # the queue has it still
        else:
            self._order.push(sequence, steps)
        if sequence.task.kv is not None and not sequence.preemptions:
            self.oldest_decode_task()  # for the sake of those that wait no more
            heapq.heappush(self._decode_tasks, (sequence.age, sequence.arrival, sequence))

    def add_in_place(self, sequence: Sequence) -> None:
        """A decode task whose KV cache is here."""
        self._count(sequence)
        self.in_place[sequence.task_id] = sequence

    def take_in_place(self) -> Sequence:
        """The first of `in_place` waits no more."""
        sequence = next(iter(self.in_place.values()))
        self.drop(sequence)
        return sequence

    def head(self, steps: int) -> Sequence:
        """Who is next in the queue, which is not empty."""
        while True:
            head = self._order.head(steps)
            assert isinstance(head, Sequence), f"{type(self._order).__name__} has lost a waiting sequence"
            if head.status is WAITING:
                return head
            self._order.pop()
            self._passed.discard(head.task_id)

    def oldest_decode_task(self) -> Sequence | None:
        """Of the decode tasks in the queue, the one whose request is the oldest."""
        tasks = self._decode_tasks
        while tasks:
            _, _, sequence = tasks[0]
            if sequence.status is WAITING and not sequence.preemptions:
                return sequence
            heapq.heappop(tasks)
        return None

    def take_head(self, head: Sequence) -> None:
        """The head of the queue is admitted."""
        self._order.pop()
        self._uncount(head)

    def take_ahead(self, sequence: Sequence) -> None:
        """One that is not the head is admitted."""
        self._passed.add(sequence.task_id)
        self._uncount(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It waits no more, wherever it did."""
        self.in_place.pop(sequence.task_id, None)
        self._uncount(sequence)

    def _count(self, sequence: Sequence) -> None:
        sequence.status = WAITING
        self.count += 1
        self.tokens += sequence.target

    def _uncount(self, sequence: Sequence) -> None:
        self.count -= 1
        self.tokens -= sequence.target
