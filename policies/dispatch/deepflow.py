"""DeepServe's distributed scheduling, Algorithm 1: PD-aware, then locality-aware if balanced, else load-aware."""

import numpy as np

from cluster.events import FirstToken, TaskFinished
from cluster.fleet import Fleet, Group
from cluster.policy import DispatchPolicy
from cluster.request import Request, Task
from cluster.vocabulary import SERVES, Role, TaskKind
from policies.dispatch.heat_map import HeatMap
from policies.dispatch.prompt_tree import PromptTree
from policies.prediction.bucket_mean import BucketMean

_SERVED_BY = {kind: role for role, kind in SERVES.items()}


class DeepFlow(DispatchPolicy):
    """`dist_sched(req, tes)` of the paper, with what it leaves open decided so:

    * load: tasks outstanding, by the job executor's own count;
    * balanced: max - min <= `balance_slack`, or max <= `balance_ratio` x min;
    * a heat map cell of 0, or no executors of the better type: the other type;
    * no prefix hit, or several executors with the longest one: the least loaded of them;
    * decode tasks go to the least loaded decode executor;
    * prompts shorter than one block, or known to be shared with nobody, have no locality: least load.
    """

    def __init__(
        self,
        heat_map: HeatMap,
        predictor: BucketMean | None = None,
        balance_slack: int = 8,
        balance_ratio: float = 1.5,
        max_tree_blocks: int = 1_000_000,
    ) -> None:
        if balance_slack < 0 or balance_ratio < 1:
            raise ValueError(
                f"dispatch: balance_slack is {balance_slack}, balance_ratio is {balance_ratio}: "
                "allowed are a slack from 0 and a ratio from 1"
            )
        if max_tree_blocks < 1:
            raise ValueError(f"dispatch: max_tree_blocks is {max_tree_blocks}: allowed are 1 and more")
        self._heat_map = heat_map
        self._predictor = predictor or BucketMean()
        self._slack = balance_slack
        self._ratio = balance_ratio
        self._max_tree_blocks = max_tree_blocks
        self._trees: dict[tuple[str, Role], PromptTree] = {}
        self._role_of: dict[str, Role] = {}

    def place(self, task: Task, fleet: Fleet, now_ns: int) -> str | None:
        groups = fleet.candidates(task)
        if not groups:
            return None
        group = self._pd_aware(task, groups)
        if task.kind is not TaskKind.DECODE and self._balanced(group):
            return self._locality_aware(task.request, group)
        return self._load_aware(group)

    # -- Algorithm 1 ----------------------------------------------------------------------------------------------

    def _pd_aware(self, task: Task, groups: list[Group]) -> Group:
        if len(groups) == 1:
            return groups[0]
        gain = self._heat_map.gain(task.context_tokens, self._predictor.predict(task.request))
        wanted = Role.PREFILL if gain > 0 else Role.COLOCATED
        return next((group for group in groups if group.role is wanted), groups[0])

    def _balanced(self, group: Group) -> bool:
        outstanding = group.outstanding  # numpy finds a place in a third of the time that the value there takes
        most, least = int(outstanding[outstanding.argmax()]), int(outstanding[outstanding.argmin()])
        return most - least <= self._slack or most <= self._ratio * least

    def _locality_aware(self, request: Request, group: Group) -> str:
        if not request.block_ids:
            return self._load_aware(group)
        _, holders = self._tree(request.model, group.role).longest_match(request.block_ids, group.names)
        return self._load_aware(group, [group.index[name] for name in holders] or None)

    def _load_aware(self, group: Group, among: list[int] | None = None) -> str:
        if among is None:
            return group.names[int(group.outstanding.argmin())]
        return group.names[among[int(np.argmin(group.outstanding[among]))]]

    # -- what it learns -------------------------------------------------------------------------------------------

    def dispatched(self, task: Task, executor: str) -> None:
        self._role_of[executor] = _SERVED_BY[task.kind]

    def first_token(self, request: Request, event: FirstToken) -> None:
        self._learn(request, event.executor)

    def finished(self, request: Request, event: TaskFinished) -> None:
        if event.stopped:
            self._predictor.observe(request, event.generated)
        self._learn(request, event.executor, known=True)

    def executor_gone(self, executor: str) -> None:
        role = self._role_of.pop(executor, None)
        for (_, tree_role), tree in self._trees.items():
            if tree_role is role:
                tree.forget(executor)

    def _learn(self, request: Request, executor: str, known: bool = False) -> None:
        """An executor caches this prompt; `known`: as it most likely has said before."""
        role = self._role_of.get(executor)
        if request.block_ids and role is not None and role is not Role.DECODE:  # decode tasks go by load alone
            tree = self._tree(request.model, role)
            if not (known and tree.holds(request.block_ids, executor)):
                tree.insert(request.block_ids, executor)

    def _tree(self, model: str, role: Role) -> PromptTree:
        key = (model, role)
        if key not in self._trees:
            self._trees[key] = PromptTree(self._max_tree_blocks)
        return self._trees[key]
