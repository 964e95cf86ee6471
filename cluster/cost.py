"""What a run costs: NPU-hours, energy and money, from what each executor was held for and how much of that it computed.

Executors are priced by their own hardware. Starting up and draining are paid for like everything else, at idle power
where nothing is computed. Money is rent plus electricity; a rented NPU's price usually contains the electricity.
Workers on CPUs hold no NPU and cost nothing here. Of the whole run, not of the measured window; tokens are those of the
answers, prompts not counted.
"""

from collections.abc import Callable

import msgspec

from cluster.recorder import Recorder
from cluster.vocabulary import NS_PER_S, ExecutorSpec

NS_PER_HOUR = 3600 * NS_PER_S


class Rates(msgspec.Struct, frozen=True):
    """Of one NPU with its share of the host. `price_per_hour` in USD; `busy_w`, `idle_w`: watts while it computes and
    while it does not. None: not known, and then neither is what it makes up.
    """

    price_per_hour: float | None = None
    busy_w: float | None = None
    idle_w: float | None = None


def costs(
    recorder: Recorder, rates_of: Callable[[ExecutorSpec], Rates], electricity_per_kwh: float = 0.0
) -> dict[str, float]:
    """By name: `npu_hours`, `busy_share` of them, `energy_kwh`, `cost_usd`, and these per million output tokens.

    NaN where a rate that is needed is not known, and where there are no tokens.
    """
    unknown = float("nan")
    npu_hours = busy_hours = energy = rent = 0.0
    for each in recorder.held():
        rates, npus = rates_of(each.spec), each.spec.npus
        if not npus:
            continue
        held, busy = npus * each.held_ns / NS_PER_HOUR, npus * min(each.busy_ns, each.held_ns) / NS_PER_HOUR
        npu_hours += held
        busy_hours += busy
        if rates.busy_w is None or rates.idle_w is None:
            energy = unknown
        else:
            energy += (busy * rates.busy_w + (held - busy) * rates.idle_w) / 1000
        rent += unknown if rates.price_per_hour is None else held * rates.price_per_hour
    cost = rent + (energy * electricity_per_kwh if electricity_per_kwh else 0.0)
    millions = int(recorder.requests["output_tokens"].sum()) / 1e6
    return {
        "npu_hours": npu_hours,
        "busy_share": busy_hours / npu_hours if npu_hours else unknown,
        "energy_kwh": energy,
        "cost_usd": cost,
        "npu_hours_per_million_tokens": npu_hours / millions if millions else unknown,
        "energy_kwh_per_million_tokens": energy / millions if millions else unknown,
        "cost_usd_per_million_tokens": cost / millions if millions else unknown,
    }
