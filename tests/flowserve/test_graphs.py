"""Decode steps by graphs: the same tokens as without, and the contract of captures and replays on an NPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flowserve.runtime.checkpoint import make_checkpoint
from flowserve.runtime.graphs import copy_tensors
from tests.flowserve.driver import Engine, make_prompt
from tests.flowserve.npu import plugged
from tests.flowserve.test_npu_engine import MODELS

PROMPTS = [make_prompt(length, length) for length in (3, 130, 20, 64, 7)]
SIZES = (1, 4, 2)


def serve(folder: Path, limits: list[int], **options: Any) -> list[list[int]]:
    """Prompts that end one after the other, so that batches of every size are decoded."""
    engine = Engine(folder, "float16", "npu", block_tokens=128, kv_blocks=16, **options)
    tasks = [engine.add(prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    engine.run()
    engine.close()
    return [engine.output[task] for task in tasks]


@pytest.mark.parametrize("model", ["llama 64", "llama 128", "qwen3 128"])
def test_the_same_tokens(tmp_path: Path, model: str) -> None:
    """Batches are filled up with a dummy and replayed; larger ones than any size, and chunks, are computed eagerly."""
    folder, limits = make_checkpoint("tiny", MODELS[model], tmp_path), [4, 8, 12, 16, 20]
    with plugged() as torch_npu:
        expected = serve(folder, limits)
        assert not torch_npu.npu.captures
        assert serve(folder, limits, graph_sizes=SIZES) == expected
        graphs = [graph for graph, _ in torch_npu.npu.captures]
        assert [graph.replays for graph in graphs] == [8, 4, 4]  # of 4, 3 padded to 4; of 2; of 1


def test_captures_share_a_pool_the_largest_first(tmp_path: Path) -> None:
    """At the first decode step all sizes are captured, in falling order, with one memory pool and updatable lengths."""
    with plugged() as torch_npu:
        engine = Engine(
            make_checkpoint("tiny", MODELS["llama 128"], tmp_path),
            "float16",
            "npu",
            SIZES,
            block_tokens=128,
            kv_blocks=4,
        )
        engine.add(PROMPTS[0], 3)
        engine.step()
        assert not torch_npu.npu.captures
        engine.step()
        captures = torch_npu.npu.captures
        assert [len(graph.attention[0]["actual_seq_lengths_kv"]) for graph, _ in captures] == [4, 2, 1]
        assert len({id(pool) for _, pool in captures}) == 1 and captures[0][1] is not None
        assert all(graph.auto_dispatch_capture for graph, _ in captures)
        assert engine.runner.about.endswith("decodes of up to 4 by graphs of [1, 2, 4]")
        engine.close()


def test_lengths_are_updated_and_inputs_stay_where_they_are(tmp_path: Path) -> None:
    """A replay sees the contexts of its step, dummies behind them, in the memory of the capture."""
    with plugged() as torch_npu:
        engine = Engine(
            make_checkpoint("tiny", MODELS["llama 128"], tmp_path),
            "float16",
            "npu",
            (4,),
            block_tokens=128,
            kv_blocks=8,
        )
        engine.add(PROMPTS[1], 6)
        engine.add(PROMPTS[2], 6)
        engine.step()
        engine.step()
        [(graph, _)] = torch_npu.npu.captures
        pieces = [call["block_table"].data_ptr() for call in graph.attention]
        assert [call["actual_seq_lengths_kv"] for call in graph.attention] == [[21, 131, 1, 2]] * 2
        engine.step()
        assert [call["actual_seq_lengths_kv"] for call in graph.attention] == [[22, 132, 1, 2]] * 2
        assert [call["block_table"].data_ptr() for call in graph.attention] == pieces
        assert {block for row in graph.attention[0]["block_table"][2:].tolist() for block in row} == {8}
        engine.close()


@pytest.mark.parametrize("change", ["no update", "another key", "no fence"])
def test_a_broken_contract_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The stand-in refuses stale lengths, under whatever name, and updates of a graph that may be running."""
    from flowserve.ops import load

    said = "stale lengths"
    with plugged() as torch_npu:
        npu = load("npu")
        if change == "no update":
            monkeypatch.setattr(torch_npu.npu.NPUGraph, "update", lambda self, cpu_update_input: None)
        elif change == "another key":
            monkeypatch.setattr(npu, "graph_updates", lambda prepared: [{"actual_seq_kvlen": [1]}])
        else:
            monkeypatch.setattr(torch_npu.npu.Event, "synchronize", lambda self: None)
            said = "while a replay may be running"
        with pytest.raises(RuntimeError, match=said):
            serve(make_checkpoint("tiny", MODELS["llama 128"], tmp_path), [4, 4, 4, 4, 4], graph_sizes=(8,))


def test_copies_in_a_capture_are_refused() -> None:
    """Work that waits for the host cannot be captured (107030)."""
    with plugged() as torch_npu:
        there = torch.ones(2, device="npu")
        with torch_npu.npu.graph(torch_npu.npu.NPUGraph()):
            with pytest.raises(RuntimeError, match="107030"):
                there.cpu()
            with pytest.raises(RuntimeError, match="107030"):
                there.copy_(torch.zeros(2))
        assert there.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("A2", (0, 4), "graph sizes are [0, 4]: allowed are batches of 1 to 128, a block's tokens"),
        ("A2", (256,), "graph sizes are [256]"),
        ("310P", (4,), "graphs of decode steps are not for 310P: leave graph_sizes empty"),
    ],
)
def test_what_is_refused(tmp_path: Path, family: str, sizes: tuple[int, ...], message: str) -> None:
    """Before anything is captured."""
    folder = make_checkpoint("tiny", MODELS["llama 128"], tmp_path)
    with plugged(family), pytest.raises(ValueError, match=re.escape(message)):
        Engine(folder, "float16", "npu", sizes, block_tokens=128, kv_blocks=4)


def test_the_cpu_computes_as_ever(tmp_path: Path) -> None:
    """There are no graphs on the CPU: the sizes change nothing, and cost no block."""
    engine = Engine(make_checkpoint("tiny", MODELS["llama 64"], tmp_path), graph_sizes=SIZES, kv_blocks=16)
    assert engine.runner.pool.tensor.shape[2] == 16
    assert "graphs" not in engine.runner.about
    engine.close()


def test_only_tensors_are_copied() -> None:
    """What a capture read from the host is part of it."""
    source, target = (torch.ones(2), ([3], 7)), (torch.zeros(2), ([4], 8))
    copy_tensors(source, target)
    assert target[0].tolist() == [1, 1] and target[1] == ([4], 8)
