"""Fine-tuning requests as a workload: given one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.vocabulary import to_ns
from cluster.work import Call, FineTuning, Truth, WorkArrival, WorkRequest


class TuningJob(msgspec.Struct, frozen=True):
    """A fine-tuning request that comes at `at_s`; the other fields are those of `cluster.work.FineTuning`.

    `evaluations` calls of `evaluation_prompt` and `evaluation_output` tokens are made in the end.
    """

    tokens: int
    at_s: float = 0.0
    epochs: float = 1.0
    steps: int | None = None
    sequence_tokens: int = 2048
    batch_sequences: int = 32
    trainable: float = 1.0
    checkpoint_steps: int | None = None
    shards: int = 1
    evaluations: int = 0
    evaluation_prompt: int = 1000
    evaluation_output: int = 200
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class TuningJobs:
    """The `jobs`, in order of time. `model`: what they train. ValueError: a job that makes no sense."""

    model: str
    jobs: Sequence[Any]

    def __iter__(self) -> Iterator[WorkArrival]:
        try:
            jobs = msgspec.convert([dict(job) for job in self.jobs], tuple[TuningJob, ...])
        except msgspec.ValidationError as error:
            raise ValueError(f"fine-tuning jobs: {error}") from error
        for number, job in enumerate(sorted(jobs, key=lambda job: job.at_s)):
            call = Call(job.evaluation_prompt, job.evaluation_output)
            work = FineTuning(
                tokens=job.tokens,
                epochs=job.epochs,
                steps=job.steps,
                sequence_tokens=job.sequence_tokens,
                batch_sequences=job.batch_sequences,
                trainable=job.trainable,
                checkpoint_steps=job.checkpoint_steps,
                shards=job.shards,
                evaluation=(call,) * job.evaluations,
            )
            request = WorkRequest(number, work, self.model, job.tenant, job.priority)
            yield WorkArrival(request, Truth((job.evaluation_output,) * job.evaluations), to_ns(job.at_s))
