"""Fixed: a constant number of executors; ones that die are replaced."""

from cluster.policy import GroupLoad, ScalingPolicy


class Fixed(ScalingPolicy):
    """As many executors as given, or as many as a group starts with."""

    def __init__(self, executors: int | None = None) -> None:
        if executors is not None and executors < 0:
            raise ValueError(
                f"scaling.executors is {executors}: allowed are 0 and more, or null to keep the start size"
            )
        self._executors = executors

    def desired(self, load: GroupLoad, now_ns: int) -> int:
        return load.initial if self._executors is None else self._executors
