"""`deepflow heatmap`: where disaggregation pays, cell by cell, as DeepServe section 5.3.1 makes its heat map."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from omegaconf import DictConfig

from cluster.metrics import RequestTable, Window
from cluster.recorder import Recorder
from cluster.request import Answer, Arrival, Request
from cluster.vocabulary import to_ns
from experiments import build
from experiments.commands.usage import split, wants_help
from experiments.config import compose
from policies.dispatch.heat_map import HeatMap

USAGE = """usage: deepflow heatmap OUT.json [KEY=VALUE ...]

Simulates batches of identical requests at fixed rates on one prefill and one decode executor, and on two colocated
ones, and writes mean JCT_colocated / JCT_disaggregated - 1 per cell, added up over the rates.
"""

PREFILL_TOKENS = (128, 512, 1024, 2048, 4096, 8192)
RATIOS = (0.02, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0)
RATES = (1.0, 2.0, 4.0, 8.0)
REQUESTS = 60


def main(arguments: list[str]) -> int:
    if wants_help(arguments, USAGE):
        return 0
    if not arguments or "=" in arguments[0]:
        raise ValueError("name the file to write first: deepflow heatmap OUT.json [KEY=VALUE ...]")
    out, (config_dirs, overrides) = Path(arguments[0]), split(arguments[1:])
    base = ["dispatch=round_robin", "coldstart=none", *overrides]
    together, apart = (compose([f"fleet={fleet}", *base], config_dirs) for fleet in ("colocated2", "pd_1p1d"))
    build.check_types(together)
    cells = [[sum(_gain(together, apart, p, r, rate) for rate in RATES) for r in RATIOS] for p in PREFILL_TOKENS]
    heat_map = HeatMap(
        prefill_edges=_edges(PREFILL_TOKENS),
        ratio_edges=_edges(RATIOS),
        cells=[[round(cell, 4) for cell in row] for row in cells],
        source=f"simulated: {build.model_name(together)} on {together.hardware.name}, 1P1D against 2 colocated, "
        f"{REQUESTS} requests per cell at {', '.join(map(str, RATES))} requests/s",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(heat_map), indent=1))
    print("prompt \\ out/in" + "".join(f"{ratio:>9g}" for ratio in RATIOS))
    for tokens, row in zip(PREFILL_TOKENS, heat_map.cells, strict=True):
        print(f"{tokens:>15}" + "".join(f"{cell:>+9.2f}" for cell in row))
    print(out)
    return 0


def _edges(centres: tuple[float, ...]) -> list[float]:
    """Lower edges of bins around the values that were simulated: their geometric means."""
    values = np.array(centres, float)
    return [0.0, *(round(float(edge), 6) for edge in np.sqrt(values[:-1] * values[1:]))]


def _gain(together: DictConfig, apart: DictConfig, prompt: int, ratio: float, rate: float) -> float:
    output = max(2, round(prompt * ratio))
    return _mean_jct(together, prompt, output, rate) / _mean_jct(apart, prompt, output, rate) - 1


def _mean_jct(cfg: DictConfig, prompt: int, output: int, rate: float) -> float:
    recorder = Recorder()
    control = build.control_plane(cfg, _identical(build.model_name(cfg), prompt, output, rate), recorder)
    with build.cluster(cfg, None) as cluster:
        control.drive(cluster)
    return float(np.nanmean(RequestTable(recorder, Window()).e2e))


def _identical(model: str, prompt: int, output: int, rate: float) -> Iterator[Arrival]:
    for number in range(REQUESTS):
        yield Arrival(Request(number, prompt, output, model), Answer(output), to_ns(number / rate))
