"""Results as a table on the terminal, and as the section of README.md between two markers."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.bench.harness import machine
from experiments.bench.harness.result import Result, Row
from experiments.tables import three_digits

BEGIN, END = "<!-- benchmarks: begin (written by `make bench`) -->", "<!-- benchmarks: end -->"


def print_results(results: list[Result], missing: dict[str, str]) -> None:
    """One row per number, and one per benchmark that could not run here, with the reason."""
    table = Table(title="Benchmarks: medians", title_justify="left")
    for heading in ("bench", "what", "value", "target", "met", "detail"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for result in results:
        for number, row in enumerate(result.rows):
            name = "" if number else f"{result.bench}\n[dim]{result.seconds:.0f} s"
            table.add_row(name, row.name, value_text(row), target_text(row), _met(row), row.detail)
        table.add_section()
    for name, reason in missing.items():
        table.add_row(name, "not run here", "", "", "", reason)
    console = Console()
    console.print(table)
    for result in results:
        if max(result.busy) > machine.QUIET:
            console.print(f"[yellow]{noise_text(result)}")


def noise_text(result: Result) -> str:
    """How much the machine did beside a benchmark."""
    before, after = result.busy
    return (
        f"{result.bench}: the machine was not idle: others used {before:.0%} of its cores just before and {after:.0%} "
        f"just after (load average {result.load:.1f})"
    )


def value_text(row: Row) -> str:
    return "not there" if row.value is None else f"{three_digits(row.value)} {row.unit}".rstrip()


def target_text(row: Row) -> str:
    if row.at_least is not None:
        return f"≥ {three_digits(row.at_least)}"
    return "" if row.at_most is None else f"≤ {three_digits(row.at_most)}"


def _met(row: Row) -> str:
    return {None: "", True: "[green]yes", False: "[red]no"}[row.met]


def markdown(results: list[Result]) -> str:
    """A table per machine and the conditions of each benchmark below it."""
    lines: list[str] = []
    machines = list(dict.fromkeys(result.machine for result in results))
    for name in machines:
        here = [result for result in results if result.machine == name]
        lines += ["", f"**{name}**, {here[0].cores} cores", "", "| bench | what | value | target | detail |"]
        lines += ["|---|---|--:|--:|---|"]
        for result in here:
            for row in result.rows:
                value = f"**{value_text(row)}**" if row.met else value_text(row)
                lines += [f"| {result.bench} | {row.name} | {value} | {target_text(row)} | {row.detail} |"]
        lines += [""]
        for result in here:
            torch = result.versions.get("torch", "none")
            noise = f"; {noise_text(result).partition(': ')[2]}" if max(result.busy) > machine.QUIET else ""
            lines += [f"- {result.bench}: {result.date[:10]}, {result.threads} thread(s), torch {torch}{noise}"]
    return "\n".join([BEGIN, *lines, "", END])


def update(path: Path, results: list[Result]) -> bool:
    """Put the results between the markers of a file; False where it has none."""
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        return False
    path.write_text(head + markdown(results) + tail)
    return True
