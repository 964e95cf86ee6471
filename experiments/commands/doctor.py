"""`deepflow doctor`: what this machine has, and every operator of its devices against its definition."""

import os

from experiments.commands.usage import Parser

USAGE = """Says what this machine has for engines, then runs every operator of its devices against its definition in
float64 on the host. Exit code 0 when all pass, 1 when one does not, 2 for a device that cannot be used."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="deepflow doctor", description=USAGE)
    parser.add_argument(
        "devices", nargs="*", help="cpu, cuda, npu, also with a number as in npu:1; default: all there are"
    )
    wanted: list[str] = parser.parse_args(arguments).devices
    # An installed torch_npu without its libraries makes `import torch` fail: we load it ourselves, and say why not.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flowserve.ops import selftest
    from flowserve.ops.device import open_device
    from flowserve.runtime import machine

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    found, about = machine.devices()
    if wanted:
        found = [open_device(name) for name in wanted]
    said = [*machine.facts(), *about]
    for device in found:
        said += machine.attention_facts(device)
    overview = Table(show_header=False, box=None)
    for fact in said:
        overview.add_row(fact.name, escape(fact.value))
    console.print(overview)

    table = Table("operator", "device", "dtype", "shapes", "max error", "limit", "verdict")
    fixes = [f"{fact.name}: {fact.fix}" for fact in said if fact.fix]
    failed = count = 0
    for device in found:
        for check in selftest.check(device):
            count += 1
            error = "-" if check.error is None else f"{check.error:.1e}"
            verdict = "ok" if check.passed else "[red]FAILED[/red]"
            row = (check.operator, str(device.device), check.dtype, escape(check.shapes))
            table.add_row(*row, error, f"{check.limit:.0e}", verdict)
            if not check.passed:
                failed += 1
                why = check.reason or f"its error is {error}, allowed is {check.limit:.0e}"
                fixes.append(f"{check.operator} on {device.device}, {check.dtype}, {check.shapes}: {why}")
    console.print(table)
    if fixes:
        console.print("To fix:")
        for fix in fixes:
            console.print(f"  {escape(fix)}", soft_wrap=True)
    console.print(f"{count - failed} of {count} operator checks passed")
    return 1 if failed else 0
