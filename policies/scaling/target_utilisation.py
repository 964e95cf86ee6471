"""Target utilisation: enough executors to keep the group's mean utilisation at a target (the Kubernetes HPA rule)."""

import math

from cluster.policy import GroupLoad, ScalingPolicy
from cluster.vocabulary import to_ns

ROUNDING = 1e-9
"""0.9 / 0.3 is a little more than 3: no executor is launched for that."""


class TargetUtilisation(ScalingPolicy):
    """desired = ceil(ready x utilisation / target), left alone within `tolerance` of the target.

    Utilisation is the larger of sequences (waiting and running) over batch places, and KV cache blocks in use over all.
    Executors still starting count as capacity, so that a slow start does not multiply them; down only after the wish
    has lasted `down_delay_s`.
    """

    def __init__(
        self, target: float = 0.7, period_s: float = 5.0, tolerance: float = 0.1, down_delay_s: float = 60.0
    ) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"scaling.target is {target}: allowed is a utilisation above 0 and up to 1")
        if tolerance < 0 or down_delay_s < 0:
            raise ValueError(
                f"scaling.tolerance is {tolerance}, scaling.down_delay_s is {down_delay_s}: allowed are 0 and more"
            )
        self.period_s = period_s
        self._target = target
        self._tolerance = tolerance
        self._down_delay_ns = to_ns(down_delay_s)
        self._over_since: dict[tuple[str, str], int] = {}

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        key, present = (load.model, str(load.role)), load.ready + load.pending
        if not load.ready:
            self._over_since.pop(key, None)
            return 1 if load.parked and not present else present
        sequences = (load.waiting + load.running + load.parked) / max(1, load.max_sequences)
        utilisation = max(sequences, load.kv_used / max(1, load.kv_total))
        ratio = utilisation / self._target
        wanted = load.ready if abs(ratio - 1) <= self._tolerance else math.ceil(load.ready * ratio - ROUNDING)
        if wanted >= present:
            self._over_since.pop(key, None)
            return wanted
        since = self._over_since.setdefault(key, now_ns)
        return wanted if now_ns - since >= self._down_delay_ns else present
