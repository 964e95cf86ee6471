"""What a training step takes, by hand, and how it moves with what it depends on."""

import msgspec
import pytest

from cluster.vocabulary import NS_PER_S, ExecutorSpec, Role
from cluster.work import Preprocess, Train
from experiments import build, compose
from sim.hardware import Hardware
from sim.model_shape import ModelShape
from sim.training import Training, WorkTimes

SPEC = ExecutorSpec("training", Role.TRAINING, 8)


def parts(hardware: str = "ascend910b2", model: str = "llama3_8b") -> tuple[Hardware, ModelShape]:
    cfg = compose([f"hardware={hardware}", f"model={model}"])
    return build.hardware_of(cfg, ExecutorSpec("m", Role.COLOCATED)), build.model_shape(cfg)


def test_a_step_by_hand() -> None:
    """32 sequences of 2,048 tokens of Llama-3-8B on eight 910B2: compute, collectives and optimiser, each by itself."""
    hardware, shape = parts()
    tokens, looked_up = 32 * 2048, shape.vocab * shape.hidden
    matrices = 6 * (shape.parameters - looked_up) * tokens
    attention = 3 * shape.flops_per_pair * 32 * 2048 * 2049 / 2
    compute = (matrices + attention) / (8 * 353.9e12 * 0.5)
    rate = 196e9 * 0.6
    sent = shape.parameters * 6 * 7 / 8 / rate + 3 * shape.layers * 2e-5
    optimiser = shape.parameters * 28 / (8 * 1.6e12 * 0.93)
    found = Training(hardware, shape, 8).step_ns(32, 2048, 1.0) / NS_PER_S
    assert found == pytest.approx(compute + sent + optimiser, rel=1e-6)
    assert 0.9 < 6 * shape.parameters * tokens / (compute * 8 * 353.9e12 * 0.5) < 1.1  # close to the 6 P T of papers


def test_adapters_take_two_thirds_of_the_compute_and_hardly_any_state() -> None:
    """Frozen weights need no gradients of their own: 4 P T; what is saved shrinks with what is trained."""
    training = Training(*parts(), 1)
    full, adapters = (training.step_ns(32, 2048, share) for share in (1.0, 0.001))
    assert 0.6 < adapters / full < 0.72
    assert training.save_ns(1.0) > 100 * training.save_ns(0.001)
    assert training.restore_ns(0.001) > training.save_ns(0.001)  # the frozen weights are read all the same


def test_more_npus_train_faster_but_not_twice() -> None:
    """Twice the NPUs halve the compute and not what they send each other."""
    hardware, shape = parts()
    four, eight = (Training(hardware, shape, npus).step_ns(32, 2048, 1.0) for npus in (4, 8))
    assert 0.5 < eight / four < 1.0


def test_a_model_that_does_not_fit_is_refused() -> None:
    """16 bytes per parameter: 128 GB of an 8B model do not fit two NPUs of 64 GB; adapters do."""
    training = Training(*parts(), 2)
    with pytest.raises(
        ValueError, match=r"training 1 of llama3-8b takes 128.5 GB .* give the training group more npus"
    ):
        training.check_fits(1.0)
    training.check_fits(0.001)


def test_tasks_take_their_steps_and_the_states_around_them() -> None:
    """Restoring comes on top where it is needed, saving always; preprocessing by the worker's rate."""
    hardware, shape = parts()
    times = WorkTimes(hardware, lambda name: shape)
    training = Training(hardware, shape, 8)
    train = Train("m", 10, 2048, 32, 1.0, restore=False)
    expected = 10 * training.step_ns(32, 2048, 1.0) + training.save_ns(1.0)
    assert times(SPEC, train) == expected
    assert times(SPEC, msgspec.structs.replace(train, restore=True)) == expected + training.restore_ns(1.0)
    assert times(SPEC, Preprocess(840_000)) == NS_PER_S
