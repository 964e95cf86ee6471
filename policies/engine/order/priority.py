"""Most important first."""

from cluster.engine_policy import EngineSequence, Key, QueueOrder


class Priority(QueueOrder):
    """By `Request.priority`, the larger the sooner; in order of arrival among equals."""

    def key(self, sequence: EngineSequence) -> Key:
        return (-sequence.task.request.priority,)
