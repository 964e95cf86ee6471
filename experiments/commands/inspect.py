"""`deepflow inspect DIR t=…`: look into a simulated run at a time, and step on from there."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from experiments.inspection import Inspection

USAGE = """usage: deepflow inspect DIR [t=SECONDS] [executor=NAME] [request=ID] [step=N]

Simulates the run of a folder again up to a time (default: its beginning; from the folder's snapshot.bin where it has
one from before), checks that it is the same run, decision by decision, and shows every executor at that time: its
queue, its batch, its KV cache.

  executor=te-3     that executor in full: waiting and running requests, the tree of cached prefixes, its tiers
  request=17        where that request is and was
  step=N            then the next N events of the control plane, or steps of that executor, and what they changed

On a terminal it asks what to show next; help lists what it understands. Exit code 1 where it is not the same run.
A snapshot is a pickle, which can run any code: inspect only folders that you trust.
"""
PROMPT = """next [N]           the next event, or N; with an executor chosen, the next step it computes
until T            simulate up to T seconds
executor [NAME]    show one executor, and step by its steps; without a name: all of them, and step by events
request ID         show one request
show               show again
quit               leave
"""


class _Asked(NamedTuple):
    folder: Path
    t: float
    executor: str | None
    request: int | None
    step: int


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    asked = _parse(arguments)
    from experiments.inspection import Inspection

    run = Inspection(asked.folder, asked.t)
    run.until(asked.t)
    _show(run, asked.executor)
    if asked.request is not None:
        _print(run.request(asked.request))
    _step(run, asked.executor, asked.step)
    if sys.stdin.isatty():
        _talk(run, asked.executor)
    return 0 if run.log.different is None else 1


def _parse(arguments: list[str]) -> _Asked:
    folders = [each for each in arguments if "=" not in each]
    values = dict(each.split("=", 1) for each in arguments if "=" in each)
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} folders: name that of one finished run, deepflow inspect DIR t=SECONDS")
    unknown = sorted(set(values) - {"t", "executor", "request", "step"})
    if unknown:
        raise ValueError(f"{unknown[0]}={values[unknown[0]]}: allowed are t=, executor=, request= and step=")
    request = values.get("request")
    return _Asked(
        Path(folders[0]),
        _number("t", values.get("t", "0")),
        values.get("executor"),
        None if request is None else int(_number("request", request)),
        int(_number("step", values.get("step", "0"))),
    )


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={text}: allowed is a number from 0 up")
    return value


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _show(run: "Inspection", executor: str | None) -> None:
    _print(run.overview())
    if executor is not None:
        _print(run.executor(executor))


def _step(run: "Inspection", executor: str | None, count: int) -> None:
    for _ in range(count):
        change = run.step(executor)
        print(f"{change.at_ns / 1e9:.6f} s: {change.said[0]}")
        _print(f"  {said}" for said in change.said[1:])
        if run.over:
            break
    if count and run.log.different is not None:
        print(run.verdict())


def _talk(run: "Inspection", executor: str | None) -> None:
    """Ask until the user has seen enough. What cannot be done is said in a line."""
    while True:
        try:
            words = input(f"{run.now_s:.6f} s> ").split()
        except EOFError:
            return
        command, rest = (words[0], words[1:]) if words else ("next", [])
        try:
            match command:
                case "n" | "next":
                    _step(run, executor, int(_number("next", rest[0])) if rest else 1)
                case "u" | "until" if rest:
                    run.until(_number("until", rest[0]))
                    _show(run, executor)
                case "e" | "executor":
                    _print(run.executor(rest[0]) if rest else run.overview())
                    executor = rest[0] if rest else None
                case "r" | "request" if rest:
                    _print(run.request(int(_number("request", rest[0]))))
                case "s" | "show":
                    _show(run, executor)
                case "q" | "quit" | "exit":
                    return
                case _:
                    print(PROMPT)
        except ValueError as error:
            print(error)
