"""Any workload, written in our own format (see `traces.readers.deepflow`)."""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cluster.vocabulary import NS_PER_S
from cluster.work import AnyArrival, Tool, WorkArrival, calls_and_tools
from traces.errors import require
from traces.readers.deepflow import CSV_FIELDS


def convert(arrivals: Iterable[AnyArrival], path: str | Path) -> int:
    """Write arrivals to a .csv or .jsonl file; returns how many. Reading it back gives equal arrivals.

    Models are named from the first one on that differs from the first request's; a reader is told that one. The file
    appears when it is complete: a cut trace looks like a short one. ValueError: another ending, no arrivals, ids that
    do not ascend, or block ids for CSV.
    """
    file = Path(path)
    require(file.suffix in _WRITERS, "path", str(file), f"a file ending in {' or '.join(_WRITERS)}", "rename it")
    part = file.with_name(file.name + ".part")
    rows = _Rows(arrivals)
    try:
        _WRITERS[file.suffix](rows, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return rows.count


class _Rows:
    """The fields of each arrival, counted; raises where an arrival cannot stand in our format behind the others."""

    def __init__(self, arrivals: Iterable[AnyArrival]) -> None:
        self.arrivals = arrivals
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        model, latest_id = "", -1
        for arrival in self.arrivals:
            number = arrival.request.request_id
            require(number > latest_id, "request_id", number, f"more than {latest_id}, the one ahead", "renumber")
            latest_id = number
            model = arrival.request.model if self.count == 0 else model
            self.count += 1
            fields = _fields(arrival)
            if arrival.request.model != model:
                fields["model"] = arrival.request.model
            yield fields
        require(self.count > 0, "the workload", "empty", "at least one arrival", "check the reader and the transforms")


def _write_csv(rows: _Rows, part: Path) -> None:
    with part.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
        writer.writeheader()
        for fields in rows:
            for name in ("block_ids", "answer_block_ids", "work"):
                require(
                    name not in fields, name, f"given (request {fields['request_id']})", "none in CSV", "use .jsonl"
                )
            writer.writerow(fields)


def _write_jsonl(rows: _Rows, part: Path) -> None:
    with part.open("wb") as out:
        for fields in rows:
            for name, value in fields.items():
                if name.endswith("_s"):
                    fields[name] = msgspec.Raw(value.encode())
            out.write(msgspec.json.encode(fields) + b"\n")


_WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl}


def _fields(arrival: AnyArrival) -> dict[str, Any]:
    """The fields of a row that are not absent; times as decimal text."""
    after = arrival.after
    fields: dict[str, Any] = {"request_id": arrival.request.request_id}
    if after is None:
        fields["arrival_s"] = _seconds(arrival.at_ns)
    else:
        awaited = "after_count" if after.request_id is None else "after_request"
        fields["after_event"] = after.event
        fields[awaited] = after.count if after.request_id is None else after.request_id
        fields["delay_s"] = _seconds(after.delay_ns)
    if arrival.request.tenant:
        fields["tenant"] = arrival.request.tenant
    if arrival.request.priority:
        fields["priority"] = arrival.request.priority
    if arrival.cancel_after_ns is not None:
        fields["cancel_after_s"] = _seconds(arrival.cancel_after_ns)
    if isinstance(arrival, WorkArrival):
        fields["work"] = arrival.request.work
        pairs = zip(calls_and_tools(arrival.request), arrival.answer.lengths, strict=True)
        fields["lengths"] = [
            msgspec.Raw(_seconds(length).encode()) if isinstance(step, Tool) else length for step, length in pairs
        ]
        return fields
    request, answer = arrival.request, arrival.answer
    fields["prompt_tokens"] = request.prompt_tokens
    fields["output_tokens"] = answer.output_tokens
    fields["max_tokens"] = request.max_tokens
    if request.deadline_ns is not None:
        fields["deadline_s"] = _seconds(request.deadline_ns)
    if request.block_ids is not None:
        fields["block_ids"] = request.block_ids
    if answer.block_ids is not None:
        fields["answer_block_ids"] = answer.block_ids
    return fields


def _seconds(time_ns: int) -> str:
    """Exact decimal seconds without trailing zeros."""
    whole, fraction = divmod(time_ns, NS_PER_S)
    return f"{whole}.{fraction:09d}".rstrip("0").rstrip(".")
