"""What a simulated run needs to be pickled beside its own objects: SimPy's environment, which binds its classes to
itself.
"""

from itertools import count
from typing import Any

import simpy


def reduce_environment(env: simpy.Environment) -> tuple[type[simpy.Environment], tuple[()], dict[str, Any]]:
    """For a pickler: a new environment, which then gets the time, the queue and the count of events of this one."""
    following = next(env._eid)
    env._eid = count(following)
    return simpy.Environment, (), {"_now": env._now, "_queue": env._queue, "_eid": count(following)}


REDUCERS = {simpy.Environment: reduce_environment}
