"""Measures one benchmark in this process and writes its data file. Arguments: NAME FOLDER [KEY=VALUE ...]."""

import os
import sys
import time
from datetime import datetime
from pathlib import Path

import msgspec

from experiments.bench.harness import machine, registry
from experiments.bench.harness.result import Result, save


def main() -> int:
    name, folder, *arguments = sys.argv[1:]
    module = registry.find(name)
    options = registry.parse(module, arguments)
    cores = machine.cores()
    before, load, started = machine.busy_share(), os.getloadavg()[0], time.monotonic()
    machine.pin(options.threads)
    rows = module.run(options)
    seconds = time.monotonic() - started
    result = Result(
        bench=name,
        about=registry.about(module),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=machine.describe(),
        cores=cores,
        threads=options.threads,
        options=msgspec.to_builtins(options),
        versions=machine.versions(),
        load=load,
        busy=(round(before, 3), round(machine.busy_share(), 3)),
        seconds=round(seconds, 1),
        rows=rows,
    )
    save(result, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
