"""`deepflow bench`: the benchmarks that this machine can run, each in a process of its own."""

import sys
from pathlib import Path

USAGE = """usage: deepflow bench [NAME [KEY=VALUE ...]]

Without a name: every benchmark this machine can run, then one table; README.md's section is written anew where the
program runs from a checkout. With a name: that one, with its own options. Each is measured in a process of its own,
pinned to as many cores as it has threads, and writes experiments/data/bench/NAME.json (with KEY=VALUE: runs/bench).
"""


def main(arguments: list[str]) -> int:
    from experiments.bench.harness import registry, table
    from experiments.bench.harness.result import DATA, load

    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        for name in registry.names():
            module = registry.find(name)
            print(f"  {name:<12}{registry.about(module)}\n{'':14}{' '.join(map(_option, registry.fields(module)))}")
        return 0
    chosen = arguments[:1] or registry.names()
    folder = Path("runs") / "bench" if arguments[1:] else DATA
    missing: dict[str, str] = {}
    failed = False
    for name in chosen:
        module = registry.find(name)
        options = registry.parse(module, arguments[1:])
        reason = registry.missing(module, options)
        if reason is not None:
            missing[name] = reason
            continue
        print(f"{name}: {registry.about(module)}", file=sys.stderr, flush=True)
        if not registry.run_apart(name, arguments[1:], options.threads, folder):
            missing[name], failed = "it failed: see above", True
    results = [load(folder / f"{name}.json") for name in chosen if name not in missing]
    table.print_results(results, missing)
    readme = Path(__file__).resolve().parents[2] / "README.md"
    if not arguments and readme.exists():
        table.update(readme, [load(path) for path in sorted(DATA.glob("*.json"))])
    print(folder)
    return int(failed)


def _option(option: tuple[str, object]) -> str:
    return f"{option[0]}={option[1]}"
