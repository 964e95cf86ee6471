"""What passes between an engine process and whoever drives it: msgpack of typed structs, one socket, both ways."""

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.acceptance import Acceptance
from cluster.events import Event
from cluster.vocabulary import ExecutorSpec, Stage
from flowserve.core.config import EngineConfig
from flowserve.core.messages import Message
from flowserve.runtime.runner import KvHandle, Payload, TokenLogprobs

Ints = npt.NDArray[np.int64]


class NullDevice(msgspec.Struct, frozen=True, tag=True):
    """No model: every step sleeps this long, tokens are a hash of the prompt. For tests of everything else."""

    step_s: float = 0.002
    prefill_token_s: float = 0.0
    vocab: int = 1000
    acceptance: Acceptance = Acceptance()
    move_block_s: float = 0.0


class TorchDevice(msgspec.Struct, frozen=True, tag=True):
    """A model from a Hugging Face folder on a torch device. `ssd_folder`: where the file of the SSD tier is, None for
    the system's folder for temporary files. `graph_sizes`: decode batches captured as graphs on the device.
    `draft_dir`: folder of the model that guesses for it. `memory_share`: of the device's memory the engine may take so
    much, and measures how many KV cache blocks that leaves; None: as many as the engine's limits say.
    """

    model_dir: str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    ssd_folder: str | None = None
    graph_sizes: tuple[int, ...] = ()
    draft_dir: str | None = None
    memory_share: float | None = None


class EngineSetup(msgspec.Struct, frozen=True):
    """All that an engine process is told at start. `start_ns`: the run's time 0 on the monotonic clock.

    `parent`: id of the process that starts it, and that it does not outlive.
    """

    executor: str
    spec: ExecutorSpec
    engine: EngineConfig
    device: NullDevice | TorchDevice
    address: str
    start_ns: int
    report_to: tuple[str, ...]
    report_period_ns: int
    parent: int
    cpu: int | None = None
    record: str | None = None
    log_level: str = "info"


class WorkerSetup(msgspec.Struct, frozen=True):
    """The same for a worker's process; `slots`: tasks side by side."""

    executor: str
    spec: ExecutorSpec
    slots: int
    address: str
    start_ns: int
    report_to: tuple[str, ...]
    report_period_ns: int
    parent: int
    log_level: str = "info"


class Deliver(msgspec.Struct, frozen=True, tag=True):
    """A message for the shell; `payload` comes with a dispatch, `handle` with an offer of KV cache.

    The payload of a task that was dispatched before its last token was known comes again, with all tokens, with the
    last offer of its KV cache.
    """

    message: Message
    payload: Payload | None = None
    handle: KvHandle | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process now."""


class StageDone(msgspec.Struct, frozen=True, tag=True):
    """A start-up stage is over."""

    stage: Stage
    at_ns: int
    took_ns: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves. `handle`: where peers read its KV cache, of `kv_blocks` blocks."""

    at_ns: int
    kv_blocks: int
    handle: KvHandle | None


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """Sampled tokens of one step, as little-endian int64 arrays: task, place in the request's output, token."""

    task_ids: bytes
    indices: bytes
    tokens: bytes

    @classmethod
    def of(cls, task_ids: Ints, indices: Ints, tokens: Ints) -> "Tokens":
        return cls(task_ids.tobytes(), indices.tobytes(), tokens.tobytes())

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        arrays = (np.frombuffer(each, dtype=np.int64).tolist() for each in (self.task_ids, self.indices, self.tokens))
        return zip(*arrays, strict=True)


class Output(msgspec.Struct, frozen=True, tag=True):
    """What one turn of the engine loop yields: tokens, events, messages to peers.

    `logprobs`: (task id, output index, probabilities) of tokens whose request asked for them. `ended`: tasks whose last
    token ends the output, by the model or by the request's stop tokens.
    """

    tokens: Tokens | None
    events: list[Event]
    peers: list[tuple[str, Message]]
    logprobs: list[tuple[int, int, TokenLogprobs]] = []
    ended: list[int] = []


class Crashed(msgspec.Struct, frozen=True, tag=True):
    """Last words of an engine process. `permanent`: it could not start, and would not the next time either."""

    reason: str
    permanent: bool = False


ToEngine = Deliver | Stop
FromEngine = StageDone | Ready | Output | Crashed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
