"""The heat map: for which prompts and outputs disaggregation pays (DeepServe 5.3.1, figure 6)."""

from bisect import bisect_right
from pathlib import Path
from typing import Self

import msgspec


class HeatMap(msgspec.Struct, frozen=True):
    """Cells of JCT_colocated / JCT_disaggregated - 1, added up over request rates: above 0, disaggregate.

    `prefill_edges` and `ratio_edges`: lower edges of the bins of prompt tokens and of output / prompt tokens; values
    below the first edge or beyond the last fall into the outer bins. `cells[prefill][ratio]`. `source`: where from.
    """

    prefill_edges: list[float]
    ratio_edges: list[float]
    cells: list[list[float]]
    source: str

    def __post_init__(self) -> None:
        for name, edges in (("prefill_edges", self.prefill_edges), ("ratio_edges", self.ratio_edges)):
            if not edges or edges != sorted(set(edges)):
                raise ValueError(f"heat map: {name} is {edges}: needed are rising numbers, at least one")
        if [len(row) for row in self.cells] != [len(self.ratio_edges)] * len(self.prefill_edges):
            raise ValueError(
                f"heat map: cells must be {len(self.prefill_edges)} rows (prefill_edges) "
                f"of {len(self.ratio_edges)} numbers (ratio_edges)"
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a heat map from JSON. Raises ValueError that names the file where it cannot be read or is malformed."""
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise ValueError(f"heat map {path} does not exist; make one with `deepflow heatmap`") from error
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:  # the last includes ValidationError
            raise ValueError(f"heat map {path}: {error}") from error

    def gain(self, prefill_tokens: int, decode_tokens: int) -> float:
        """The cell of a request: above 0, disaggregation finished such requests sooner."""
        row = max(0, bisect_right(self.prefill_edges, prefill_tokens) - 1)
        column = max(0, bisect_right(self.ratio_edges, decode_tokens / prefill_tokens) - 1)
        return self.cells[row][column]
