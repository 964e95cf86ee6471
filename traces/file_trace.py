"""What all readers of trace files share: their arguments, and the requests they make."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.request import Answer, Arrival, Request
from cluster.work import AnyArrival
from traces.catalog import resolve
from traces.errors import TraceError, require
from traces.rows import Row


@dataclass(frozen=True)
class FileTrace(ABC):
    """An iterable of arrivals read from a file, in constant memory, afresh at each `iter()`.

    `path`: a file, or a name or path that `traces.catalog` finds. `model`: what every request asks for.
    `max_tokens`: the client's limit put on every request, raised where the true output is longer.
    `min_output`: outputs shorter than it are raised to it; some public traces have outputs of 0 tokens, which are
    errors unless this is 1.

    Raises `TraceError` when there is no such file (at once), and at the first row that cannot be used.
    """

    path: str | Path
    model: str
    max_tokens: int = 2048
    min_output: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1 token", "choose a client's limit")
        require(self.min_output >= 0, "min_output", self.min_output, "0 or more tokens", "1 admits empty outputs")
        resolve(self.path)

    def __iter__(self) -> Iterator[AnyArrival]:
        file = resolve(self.path)
        empty = True
        for arrival in self.read(file):
            empty = False
            yield arrival
        if empty:
            raise TraceError(f"{file}: the trace has no rows: allowed is at least one; fetch the file again")

    @abstractmethod
    def read(self, file: Path) -> Iterator[AnyArrival]:
        """The arrivals of `file` in order; nothing where it has no rows."""

    def output_tokens(self, row: Row, name: str) -> int:
        """The true output length: at least 1."""
        tokens = max(row.integer(name, least=0), self.min_output)
        if tokens == 0:
            raise row.error(name, "at least 1 token", "min_output=1 takes an empty output for one token")
        return tokens

    def arrival(
        self, request_id: int, at_ns: int, prompt_tokens: int, output_tokens: int, ids: tuple[int, ...] | None = None
    ) -> Arrival:
        """An open-loop request with the reader's model and limit."""
        limit = max(self.max_tokens, output_tokens)
        request = Request(request_id, prompt_tokens, limit, self.model, ids)
        return Arrival(request, Answer(output_tokens), at_ns)
