"""An agent's turn: LLM calls and tool calls in turns, until the last answer (DeepServe section 3)."""

from cluster.jobs.job import CallStep, Job
from cluster.work import Agent, Call, Operation, RunTool


class AgentLoop(Job):
    """One round after the other: what the model calls for is run, and goes into the next prompt."""

    kind = "agent"

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._round = 0
        self._step = 0

    def next(self) -> list[CallStep | Operation]:
        if self._round == len(self._agent.rounds):
            return []
        steps: list[CallStep | Operation] = []
        for step in self._agent.rounds[self._round]:
            steps.append(CallStep(step, self._step) if isinstance(step, Call) else RunTool(step.name, self._step))
            self._step += 1
        self._round += 1
        return steps
