"""Where trace files are found, and which public ones are known: file, format, licence, source.

Trace files are not part of the repository. They are looked for in the folders of the environment variable
`DEEPFLOW_TRACES` (colon-separated), then in `data/traces/` of the checkout, then in the user's cache folder.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from traces.errors import TraceError

VARIABLE = "DEEPFLOW_TRACES"

_AZURE = "https://github.com/Azure/AzurePublicDataset, data/"
_MOONCAKE = "https://github.com/kvcache-ai/Mooncake, FAST25-release/traces/"


@dataclass(frozen=True, slots=True)
class KnownTrace:
    """A public trace: `file` below a trace folder, `format` as its reader is called, where it is from, its terms."""

    file: str
    format: str
    about: str
    licence: str
    source: str


KNOWN: dict[str, KnownTrace] = {
    "azure2023_code": KnownTrace(
        file="azure2023/AzureLLMInferenceTrace_code.csv",
        format="azure2023",
        about="code completion, 8,819 requests in 57 minutes, bursty (Patel et al., Splitwise, ISCA 2024)",
        licence="CC-BY-4.0",
        source=_AZURE + "AzureLLMInferenceTrace_code.csv",
    ),
    "azure2023_conv": KnownTrace(
        file="azure2023/AzureLLMInferenceTrace_conv.csv",
        format="azure2023",
        about="conversation, 19,366 requests in 58 minutes (Patel et al., Splitwise, ISCA 2024)",
        licence="CC-BY-4.0",
        source=_AZURE + "AzureLLMInferenceTrace_conv.csv",
    ),
    "claude_code": KnownTrace(
        file="claude-code-weka/traces_first60.tar.xz",
        format="claude_code",
        about="coding agents with tools and think times, the first 60 sessions of 739 (kv-cache-tester)",
        licence="Apache-2.0",
        source="https://github.com/callanjfox/kv-cache-tester, traces/",
    ),
    "mooncake_conversation": KnownTrace(
        file="mooncake/conversation_trace.jsonl",
        format="mooncake",
        about="Kimi chat with prefix hashes, 12,031 requests in 59 minutes (Qin et al., Mooncake, FAST 2025)",
        licence="Apache-2.0",
        source=_MOONCAKE + "conversation_trace.jsonl",
    ),
    "mooncake_toolagent": KnownTrace(
        file="mooncake/toolagent_trace.jsonl",
        format="mooncake",
        about="Kimi tools and agents with prefix hashes, 23,608 requests in 59 minutes (Mooncake, FAST 2025)",
        licence="Apache-2.0",
        source=_MOONCAKE + "toolagent_trace.jsonl",
    ),
    "mooncake_synthetic": KnownTrace(
        file="mooncake/synthetic_trace.jsonl",
        format="mooncake",
        about="synthetic mix with prefix hashes (Mooncake, FAST 2025)",
        licence="Apache-2.0",
        source=_MOONCAKE + "synthetic_trace.jsonl",
    ),
}


def folders() -> list[Path]:
    """Folders searched for trace files, first match wins; they need not exist."""
    listed = [Path(part).expanduser() for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    checkout = Path(__file__).resolve().parent.parent
    return [*listed, checkout / "data" / "traces", Path.home() / ".cache" / "deepflow" / "traces"]


def find(name: str) -> Path | None:
    """The file of a known trace, or of a path below a trace folder; None where no folder has it."""
    below = KNOWN[name].file if name in KNOWN else name
    return next((folder / below for folder in folders() if (folder / below).is_file()), None)


def resolve(path: str | Path) -> Path:
    """An existing file as it is; otherwise what `find` finds. TraceError: neither, with the folders searched."""
    direct = Path(path).expanduser()
    found = direct if direct.is_file() else find(str(path))
    if found is None:
        known = KNOWN.get(str(path))
        remedy = (
            f"get {known.file} from {known.source}"
            if known
            else f"give an existing file or one of the known names: {', '.join(KNOWN)}"
        )
        raise TraceError(
            f"{path}: there is no such trace file; searched {', '.join(map(str, folders()))} "
            f"(folders of {VARIABLE}, data/traces, the user's cache); {remedy}"
        )
    return found
