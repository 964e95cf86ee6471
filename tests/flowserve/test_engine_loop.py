"""The loop of an engine process, between a socket and a runner, in this process."""

import logging
import os

import msgspec
import pytest
import zmq

from cluster.request import Answer, Task
from cluster.vocabulary import Role, TaskKind
from flowserve.core.messages import Dispatch, KvOffered, KvRequested
from flowserve.core.plan import Plan
from flowserve.core.scheduler import EngineConfig
from flowserve.runtime import wire
from flowserve.runtime.engine_process import EngineLoop
from flowserve.runtime.mover import Mover
from flowserve.runtime.null_runner import NullRunner
from flowserve.runtime.runner import Payload
from flowserve.runtime.sampling import Sampling
from tests.builders import make_request, make_spec

DEVICE = wire.NullDevice(0.0)


class Watched(NullRunner):
    """Notes what the engine has said before it computes, and has it stop after that step."""

    def __init__(self, cluster: "zmq.Socket[bytes]") -> None:
        super().__init__(DEVICE)
        self.cluster = cluster
        self.said: list[wire.FromEngine] = []

    def launch(self, plan: Plan) -> None:
        while self.cluster.poll(0):
            self.said.append(wire.decode_from_engine(self.cluster.recv()))
        self.cluster.send(wire.encode(wire.Stop()))
        super().launch(plan)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_peers_are_answered_before_the_next_step(in_flight: int) -> None:
    """Who asks for KV cache does not wait for a step that the engine begins in the same turn."""
    engine = EngineConfig(kv_blocks=16, max_in_flight=in_flight)
    setup = wire.EngineSetup("te-0", make_spec(Role.PREFILL), engine, DEVICE, "", 0, (), 10**9, os.getpid())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    cluster, socket = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    mover = Mover(lambda move: None)
    try:
        cluster.bind("inproc://engine")
        socket.connect("inproc://engine")
        task = Task(1, make_request(1, prompt=20, limit=5), TaskKind.PREFILL)
        cluster.send(wire.encode(wire.Deliver(KvRequested(7, 8, "te-1"))))
        payload = Payload([5] * 20, Sampling(), Answer(5))
        cluster.send(wire.encode(wire.Deliver(Dispatch("je-0", task), payload=payload)))
        runner = Watched(cluster)
        EngineLoop(setup, socket, runner, mover, None, logging.getLogger("test")).run()
        peers = [peer for each in runner.said if isinstance(each, wire.Output) for peer in each.peers]
        assert msgspec.to_builtins(peers) == msgspec.to_builtins(
            [("te-1", KvOffered(7, 8, "te-0", None, engine.block_tokens))]
        )
    finally:
        mover.close()
        for each in (cluster, socket):
            each.close(0)
        context.term()
