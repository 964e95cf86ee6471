"""What launching an executor takes, stage by stage (DeepServe table 2)."""

import msgspec

from cluster.vocabulary import Stage, to_ns


class ColdStart(msgspec.Struct, frozen=True):
    """Seconds per stage. Weights come from local DRAM or SSD at `load_bytes_per_s`, after `load_setup_s`."""

    scaler_pre_s: float = 0.0
    te_pre_load_s: float = 0.0
    load_setup_s: float = 0.0
    load_bytes_per_s: float | None = None
    te_post_load_s: float = 0.0
    scaler_post_s: float = 0.0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}: allowed are 0 and more")

    def stages(self, weight_bytes: int) -> list[tuple[Stage, int]]:
        """(stage, ns) in order."""
        load = self.load_setup_s + (weight_bytes / self.load_bytes_per_s if self.load_bytes_per_s else 0.0)
        return [
            (Stage.SCALER_PRE, to_ns(self.scaler_pre_s)),
            (Stage.TE_PRE_LOAD, to_ns(self.te_pre_load_s)),
            (Stage.TE_LOAD, to_ns(load)),
            (Stage.TE_POST_LOAD, to_ns(self.te_post_load_s)),
            (Stage.SCALER_POST, to_ns(self.scaler_post_s)),
        ]
