"""Which jobs a request becomes. A new kind of work: a struct in `cluster/work.py`, its jobs here, a file each."""

from cluster.jobs.agent import AgentLoop
from cluster.jobs.evaluate import Evaluate
from cluster.jobs.job import Job
from cluster.jobs.preprocess import Preprocess
from cluster.jobs.train import Train
from cluster.work import Agent, WorkRequest


def jobs_of(request: WorkRequest) -> list[Job]:
    """The jobs of a request, one after the other."""
    work = request.work
    if isinstance(work, Agent):
        return [AgentLoop(work)]
    evaluation: list[Job] = [Evaluate(work)] if work.evaluation else []
    return [Preprocess(work), Train(work, request.model), *evaluation]
