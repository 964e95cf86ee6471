"""Our own trace format, as CSV or JSONL (by the file's ending). Every workload can be written in it: `traces.convert`.

One request per row, in order of arrival. Times are seconds with up to nine decimals and are kept exactly.

| field | needed | meaning |
|---|---|---|
| arrival_s | yes, or after_… | when the request comes, from the start of the run; never before the row above |
| prompt_tokens | yes | tokens of the prompt, at least 1 |
| output_tokens | yes | tokens of the true output, at least 1 |
| request_id | no | whole number, greater than in the row above; else the row's index from 0 |
| max_tokens | no | the client's limit, at least output_tokens; else what the reader is told |
| model | no | name of the model asked for; else the one the reader is told |
| tenant | no | text |
| priority | no | whole number, the larger the more important; else 0 |
| deadline_s | no | the whole answer is due so long after the request arrived, more than 0 |
| block_ids | no, JSONL only | chained ids of the prompt's full 16-token blocks: equal ids, equal prefix |
| answer_block_ids | no, JSONL only | the same for prompt and output together; begins with block_ids |
| after_event | closed loop | `first_token` or `ended`: the event waited for, instead of arrival_s |
| after_request | closed loop | id of the request waited for, which stands in an earlier row |
| after_count | closed loop | or: wait until so many requests of the run got there |
| delay_s | no | closed loop: time between the event and the request (think time), 0 if absent |
| cancel_after_s | no | the client gives up so long after it sent the request |
| work | JSONL only | work other than serving, in place of all fields of tokens and blocks: see below |
| lengths | with work | how long each of its steps really is: tokens of a call's answer, seconds of a tool |

In CSV an empty field is an absent one. An unknown field is an error, so that a misspelt one is not lost silently.

    arrival_s,prompt_tokens,output_tokens
    0,1000,100
    0.25,1200,80

    {"arrival_s":0,"prompt_tokens":20,"output_tokens":14,"block_ids":[71],"answer_block_ids":[71,83]}
    {"after_event":"ended","after_request":0,"delay_s":4.5,"prompt_tokens":50,"output_tokens":9,"block_ids":[71,83,90]}

Work is one of the structs of `cluster.work` with its type: an agent's turn with its rounds of calls and tools, or
fine-tuning.

    {"arrival_s":0,"work":{"type":"Agent","contexts":[[71,83]],"rounds":[[{"type":"Call","prompt_tokens":20,
     "max_tokens":50,"context":0}],[{"type":"Tool","name":"grep"}]]},"lengths":[14,2.5]}
    {"arrival_s":9,"work":{"type":"FineTuning","tokens":1000000}}
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from cluster.request import Answer, Arrival, Request, Trigger
from cluster.vocabulary import BLOCK_TOKENS
from cluster.work import Agent, AnyArrival, FineTuning, Tool, Truth, WorkArrival, WorkRequest
from traces.errors import TraceError
from traces.file_trace import FileTrace
from traces.rows import Row, csv_rows, jsonl_rows

REQUIRED = ("prompt_tokens", "output_tokens")
CSV_FIELDS = (
    "request_id",
    "arrival_s",
    "after_event",
    "after_request",
    "after_count",
    "delay_s",
    "prompt_tokens",
    "output_tokens",
    "max_tokens",
    "model",
    "tenant",
    "priority",
    "deadline_s",
    "cancel_after_s",
)
JSONL_FIELDS = (*CSV_FIELDS, "block_ids", "answer_block_ids", "work", "lengths")
NOT_WITH_WORK = (*REQUIRED, "max_tokens", "deadline_s", "block_ids", "answer_block_ids")

_MOST = (1 << 63) - 1


class DeepFlowTrace(FileTrace):
    """Reads our own format. ValueError (`TraceError`): an unknown ending, or a row that breaks the rules above."""

    def read(self, file: Path) -> Iterator[AnyArrival]:
        latest_ns, latest_id = 0, -1
        for index, row in enumerate(_rows(file)):
            for name in row.values:
                if name not in JSONL_FIELDS:
                    raise row.error(name, f"none but {', '.join(JSONL_FIELDS)}", "rename the field or delete it")
            works = row.has("work")
            request = self._work(row, index) if works else self._request(row, index)
            if request.request_id <= latest_id:
                raise row.error("request_id", f"more than {latest_id}, the row above", "number requests in row order")
            latest_id = request.request_id
            after = _trigger(row, request.request_id)
            at_ns = 0
            if after is None:
                at_ns = row.time_ns("arrival_s")
                row.not_before("arrival_s", at_ns, latest_ns)
                latest_ns = at_ns
            cancel_ns = row.time_ns("cancel_after_s") if row.has("cancel_after_s") else None
            if isinstance(request, WorkRequest):
                yield _work_arrival(row, request, at_ns, after, cancel_ns)
                continue
            answer = self._answer(row, request)
            if request.max_tokens < answer.output_tokens:
                raise row.error("max_tokens", f"at least output_tokens, {answer.output_tokens}")
            yield Arrival(request, answer, at_ns, after, cancel_ns)

    def _request(self, row: Row, index: int) -> Request:
        prompt = row.integer("prompt_tokens", least=1)
        full = prompt // BLOCK_TOKENS
        limit = max(self.max_tokens, self.output_tokens(row, "output_tokens"))
        return Request(
            request_id=row.integer("request_id", least=0, most=_MOST) if row.has("request_id") else index,
            prompt_tokens=prompt,
            max_tokens=row.integer("max_tokens", least=1) if row.has("max_tokens") else limit,
            model=row.text("model") or self.model,
            block_ids=row.numbers("block_ids", full, "prompt_tokens // 16") if row.has("block_ids") else None,
            tenant=row.text("tenant"),
            priority=row.integer("priority", least=-_MOST, most=_MOST) if row.has("priority") else 0,
            deadline_ns=_deadline(row) if row.has("deadline_s") else None,
        )

    def _work(self, row: Row, index: int) -> WorkRequest:
        for name in NOT_WITH_WORK:
            if row.has(name):
                raise row.error(name, "none beside work", "leave it out")
        try:
            work: Agent | FineTuning = msgspec.json.decode(_ENCODE(row.values["work"]), type=Agent | FineTuning)
            return WorkRequest(
                request_id=row.integer("request_id", least=0, most=_MOST) if row.has("request_id") else index,
                work=work,
                model=self.model,
                tenant=row.text("tenant"),
                priority=row.integer("priority", least=-_MOST, most=_MOST) if row.has("priority") else 0,
            )
        except (msgspec.ValidationError, ValueError) as error:
            if isinstance(error, TraceError):
                raise
            raise row.error("work", f"an Agent or FineTuning that can be ({error})") from error

    def _answer(self, row: Row, request: Request) -> Answer:
        tokens = self.output_tokens(row, "output_tokens")
        if not row.has("answer_block_ids"):
            return Answer(tokens)
        full = (request.prompt_tokens + tokens) // BLOCK_TOKENS
        ids = row.numbers("answer_block_ids", full, "(prompt_tokens + output_tokens) // 16")
        if request.block_ids is None or ids[: len(request.block_ids)] != request.block_ids:
            raise row.error("answer_block_ids", "a list that begins with block_ids")
        return Answer(tokens, ids)


_ENCODE = msgspec.json.Encoder(decimal_format="number").encode


def _work_arrival(
    row: Row, request: WorkRequest, at_ns: int, after: Trigger | None, cancel_ns: int | None
) -> WorkArrival:
    """A row of work; tools are given in seconds."""
    steps = request.work.steps if isinstance(request.work, Agent) else request.work.evaluation
    given = row.values.get("lengths") or []
    if not isinstance(given, list) or len(given) != len(steps):
        raise row.error("lengths", f"a list of {len(steps)} numbers, one for each call and tool of work")
    lengths = []
    for step, length in zip(steps, given, strict=True):
        each = Row(row.file, row.line, {"lengths": length})
        lengths.append(each.time_ns("lengths") if isinstance(step, Tool) else each.integer("lengths", least=1))
    return WorkArrival(request, Truth(tuple(lengths)), at_ns, after, cancel_ns)


def _rows(file: Path) -> Iterator[Row]:
    match file.suffix:
        case ".csv":
            return csv_rows(file, REQUIRED, CSV_FIELDS)
        case ".jsonl":
            return jsonl_rows(file)
    raise TraceError(f"{file}: the ending is {file.suffix!r}: allowed is .csv or .jsonl; rename or convert the file")


def _deadline(row: Row) -> int:
    deadline_ns = row.time_ns("deadline_s")
    if deadline_ns == 0:
        raise row.error("deadline_s", "more than 0", "leave it out where there is none")
    return deadline_ns


def _trigger(row: Row, request_id: int) -> Trigger | None:
    """What a closed-loop row waits for; None for a row with a time."""
    waits = [name for name in ("after_event", "after_request", "after_count", "delay_s") if row.has(name)]
    if not waits:
        return None
    if row.has("arrival_s"):
        raise row.error(waits[0], "none beside arrival_s", "give a time or what to wait for")
    if row.has("after_request") == row.has("after_count"):
        raise row.error("after_request", "exactly one of after_request and after_count")
    delay_ns = row.time_ns("delay_s") if row.has("delay_s") else 0
    event = _event(row)
    if row.has("after_count"):
        return Trigger(event, count=row.integer("after_count", least=1, most=_MOST), delay_ns=delay_ns)
    awaited = row.integer("after_request", least=0, most=_MOST)
    if awaited >= request_id:
        raise row.error("after_request", f"the id of an earlier row, below {request_id}")
    return Trigger(event, request_id=awaited, delay_ns=delay_ns)


def _event(row: Row) -> Literal["first_token", "ended"]:
    match row.text("after_event"):
        case "first_token":
            return "first_token"
        case "ended":
            return "ended"
    raise row.error("after_event", "first_token or ended")
