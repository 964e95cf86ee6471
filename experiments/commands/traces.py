"""`deepflow traces`: what traces there are, what is in them, and making others."""

from pathlib import Path

from experiments.commands.usage import Parser


def main(arguments: list[str]) -> int:
    parser = Parser(prog="deepflow traces", description="Request traces: find, describe, convert, make.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="known traces, and which of them are found here")
    stats = commands.add_parser("stats", help="number, rates, lengths and shared prefixes of a trace")
    convert = commands.add_parser("convert", help="write any trace in our own format (.jsonl or .csv)")
    for command in (stats, convert):
        command.add_argument("trace", help="a known name or a file")
        command.add_argument(
            "--format", help="of the file, where it is not a known trace: azure2023, mooncake, claude_code, deepflow"
        )
    convert.add_argument("out", type=Path)
    generate = commands.add_parser("generate", help="write a workload from the fitted generator")
    generate.add_argument("profile", help="e.g. azure2023_conv")
    generate.add_argument("out", type=Path)
    generate.add_argument("--rate", type=float, default=5.0, help="requests/s (default %(default)s)")
    generate.add_argument("--duration", type=float, default=600.0, help="seconds (default %(default)s)")
    generate.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    match args.command:
        case "list":
            _list()
        case "stats":
            _stats(args.trace, args.format)
        case "convert":
            _convert(args.trace, args.format, args.out)
        case "generate":
            _generate(args.profile, args.rate, args.duration, args.seed, args.out)
    return 0


def _list() -> None:
    from traces.catalog import KNOWN, find, folders

    for name, known in KNOWN.items():
        print(f"{name:<24}{find(name) or 'not found'}\n{'':<24}{known.about}; {known.licence}; {known.source}")
    print(f"searched: {', '.join(map(str, folders()))}")


def _stats(trace: str, format: str | None) -> None:
    from traces.formats import open_trace
    from traces.stats import stats_of, table

    print(table(stats_of(open_trace(trace, "any", format))))


def _convert(trace: str, format: str | None, out: Path) -> None:
    from traces.convert import convert
    from traces.formats import open_trace

    print(f"{convert(open_trace(trace, 'any', format), out)} requests")
    print(out)


def _generate(profile: str, rate: float, duration_s: float, seed: int, out: Path) -> None:
    from traces.convert import convert
    from traces.synthetic import SyntheticTrace

    print(f"{convert(SyntheticTrace(profile, rate, duration_s, 'any', seed), out)} requests")
    print(out)
