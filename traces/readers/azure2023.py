"""Azure LLM inference traces (Microsoft, CC-BY-4.0): wall-clock stamps and lengths, no content.

https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md. The one-week files of 2024 have the same
columns, with or without a fraction of a second and with `+00:00` behind it; they are read as well.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cluster.request import Arrival
from cluster.vocabulary import NS_PER_S
from traces.file_trace import FileTrace
from traces.rows import Row, csv_rows

TIME, PROMPT, OUTPUT = "TIMESTAMP", "ContextTokens", "GeneratedTokens"

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:\+00:00)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1)


class AzureTrace(FileTrace):
    """CSV with TIMESTAMP (wall clock, 100 ns digits), ContextTokens, GeneratedTokens; the first row comes at time 0.

    Nothing is said of content, so no two requests share any. `request_id` is the row's index.
    """

    def read(self, file: Path) -> Iterator[Arrival]:
        first = latest = None
        for index, row in enumerate(csv_rows(file, required=(TIME, PROMPT, OUTPUT))):
            stamp = _stamp_ns(row)
            if first is None or latest is None:
                first = latest = stamp
            row.not_before(TIME, stamp, latest)
            latest = stamp
            yield self.arrival(index, stamp - first, row.integer(PROMPT, least=1), self.output_tokens(row, OUTPUT))


def _stamp_ns(row: Row) -> int:
    """Nanoseconds since 1970. The fraction goes digit by digit: as a float, 100 ns would drown in the date."""
    match = _STAMP.fullmatch(row.text(TIME).strip())
    try:
        since = datetime.fromisoformat(match[1]) - _EPOCH if match else None
    except ValueError:
        since = None
    if match is None or since is None:
        raise row.error(TIME, "a date and time like 2023-11-16 18:15:46.6805900")
    return (since.days * 86_400 + since.seconds) * NS_PER_S + int((match[2] or "").ljust(9, "0"))
