"""What launching an executor takes, stage by stage (DeepServe table 2)."""

from typing import Literal

import msgspec

from cluster.vocabulary import Stage, to_ns


class Load(msgspec.Struct, frozen=True):
    """How weights get into an executor: `file_bytes` of its model, which become `device_bytes` on all NPUs together, of
    which each of `pipeline_stages` has its layers.

    From local DRAM, or from SSD into DRAM's page cache and on; with `fork` from a running executor of the same model,
    size and stages where there is one, by a broadcast in which each sends on to `fanout` others (1: a chain), in chunks
    of `chunk_bytes` per NPU. `setup_s` comes before loading, `fork_setup_s` before a fork.
    """

    file_bytes: int
    device_bytes: int
    setup_s: float = 0.0
    fork: bool = False
    fork_setup_s: float = 0.0
    fanout: int = 1
    chunk_bytes: float = 200e6
    pipeline_stages: int = 1


class ColdStart(msgspec.Struct, frozen=True):
    """Seconds per stage. `load`: whether weights are moved, from local DRAM or SSD or by NPU-fork; where they are not,
    `load_setup_s` is all that TE-Load takes. `preloaded`: whether they are in every host's page cache when the run
    begins. The rest as in `Load`.
    """

    scaler_pre_s: float = 0.0
    te_pre_load_s: float = 0.0
    load_setup_s: float = 0.0
    te_post_load_s: float = 0.0
    scaler_post_s: float = 0.0
    load: Literal["none", "local", "fork"] = "none"
    preloaded: bool = False
    fork_setup_s: float = 0.0
    fork_fanout: int = 1
    fork_chunk_bytes: float = 200e6

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if field.endswith("_s") and getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}: allowed are 0 and more")
        if self.fork_fanout < 1 or not self.fork_chunk_bytes > 0:
            raise ValueError(
                f"fork_fanout is {self.fork_fanout} and fork_chunk_bytes {self.fork_chunk_bytes}: allowed are 1 (a "
                "chain) and more, and bytes above 0"
            )

    def stages(self) -> list[tuple[Stage, int]]:
        """(stage, ns) in order, without what moving weights takes."""
        return [
            (Stage.SCALER_PRE, to_ns(self.scaler_pre_s)),
            (Stage.TE_PRE_LOAD, to_ns(self.te_pre_load_s)),
            (Stage.TE_LOAD, to_ns(self.load_setup_s) if self.load == "none" else 0),
            (Stage.TE_POST_LOAD, to_ns(self.te_post_load_s)),
            (Stage.SCALER_POST, to_ns(self.scaler_post_s)),
        ]

    def loading(self, file_bytes: int, device_bytes: int, pipeline_stages: int = 1) -> Load | None:
        """How a model's weights are loaded; None: they are there."""
        if self.load == "none":
            return None
        return Load(
            file_bytes,
            device_bytes,
            self.load_setup_s,
            self.load == "fork",
            self.fork_setup_s,
            self.fork_fanout,
            self.fork_chunk_bytes,
            pipeline_stages,
        )
