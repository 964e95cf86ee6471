"""Structured logs of an engine process: one JSON object a line, for people with `jq` and for log collectors alike."""

import json
import logging
import sys
import time
import traceback
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message"}


class JsonLines(logging.Formatter):
    """`time` (UTC), `level`, `executor`, `event`, then what the call passed as `extra`."""

    def __init__(self, executor: str) -> None:
        super().__init__()
        self._executor = executor

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "executor": self._executor,
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, default=str)


def engine_logger(executor: str, level: str) -> logging.Logger:
    """The logger of an engine process, writing to stderr. `level`: one of LEVELS. Raises ValueError for another."""
    if level not in LEVELS:
        raise ValueError(f"log_level is {level!r}: allowed are {', '.join(LEVELS)}")
    logger = logging.getLogger(f"flowserve.{executor}")
    logger.setLevel(level.upper())
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(executor))
    logger.handlers = [handler]
    return logger


def last_words(text: str) -> str:
    """The last thing that a log says, in one line: the error, where its last entry has one."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    try:
        entry = json.loads(last)
    except json.JSONDecodeError:
        return last  # printed by something else
    if not isinstance(entry, dict):
        return last
    return str(entry.get("error", entry.get("event", last))).strip().splitlines()[-1]
