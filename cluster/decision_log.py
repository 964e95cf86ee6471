"""`decisions.jsonl`: every event with the actions it called for, so that a run can be replayed bit for bit."""

import msgspec

from cluster.actions import Action
from cluster.events import Event

LOG_SCHEMA = "deepflow-decisions/1"


class Decision(msgspec.Struct, frozen=True):
    """One line of `decisions.jsonl`: what the control plane did about an event."""

    sequence: int
    event: Event
    actions: list[Action]


class LogHeader(msgspec.Struct, frozen=True):
    """First line of `decisions.jsonl`."""

    schema: str = LOG_SCHEMA
