"""What is noted of jobs while they run: one row per job, and how long every task waited for its slot."""

from array import array

from cluster.vocabulary import Outcome, Role


class JobRow:
    """One job. Times in ns; None: not there yet. `npu_ns`: NPUs times the time its tasks ran, lost ones included."""

    __slots__ = (
        "arrived_ns",
        "calls",
        "ended_ns",
        "failed_tasks",
        "generated_tokens",
        "kind",
        "npu_ns",
        "outcome",
        "ran_ns",
        "reason",
        "request_id",
        "started_ns",
        "steps",
        "tasks",
        "tenant",
        "tokens",
        "waited_ns",
    )

    def __init__(self, request_id: int, tenant: str, kind: str, arrived_ns: int, started_ns: int) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.kind = kind
        self.arrived_ns = arrived_ns
        self.started_ns = started_ns
        self.ended_ns: int | None = None
        self.outcome = "unfinished"
        self.reason = "the run ended first"
        self.calls = 0
        self.tasks = 0
        self.failed_tasks = 0
        self.waited_ns = 0
        self.ran_ns = 0
        self.npu_ns = 0
        self.tokens = 0
        self.steps = 0
        self.generated_tokens = 0


class JobRecorder:
    """Rows of all jobs in order of their start, and of tasks that ran: where, how long they waited, how long they ran.

    Memory: a row per job, 16 bytes per task.
    """

    def __init__(self) -> None:
        self.rows: list[JobRow] = []
        self.waits: dict[Role, array[int]] = {Role.CPU: array("q"), Role.TRAINING: array("q")}
        self.tool_waits = array("q")
        self.call_ns = array("q")
        """From each LLM call that finished to its answer."""

    def started(self, request_id: int, tenant: str, kind: str, arrived_ns: int, now: int) -> JobRow:
        """A job begins."""
        row = JobRow(request_id, tenant, kind, arrived_ns, now)
        self.rows.append(row)
        return row

    def ended(self, row: JobRow, outcome: Outcome, reason: str, now: int) -> None:
        """A job is over, well or not."""
        row.ended_ns, row.outcome, row.reason = now, str(outcome), reason
