"""The stand-in torch_npu catches what the operators' documentation forbids: real calls, one thing wrong in each."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowserve.runtime.checkpoint import make_checkpoint
from tests.flowserve.driver import Engine, make_prompt
from tests.flowserve.npu import plugged, recorded
from tests.flowserve.test_npu_engine import MODELS

Arguments = dict[str, Any]
Change = Callable[[Arguments], None]
RUNS = {
    "TND": ("A2", "llama 128"),
    "BSND": ("A2", "llama 64"),
    "MoE": ("A2", "qwen3_moe 128"),
    "310P": ("310P", "llama 64"),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """All calls of a small run per choice of operators: two prompts, a step of chunks, a mixed one, one of decodes."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for run, (family, model) in RUNS.items():
        with plugged(family), recorded() as recording:
            engine = Engine(
                make_checkpoint("tiny", MODELS[model], root), "float16", "npu", block_tokens=128, kv_blocks=8
            )
            engine.add(make_prompt(0, 140), 4)
            engine.step()
            engine.add(make_prompt(1, 9), 4)
            engine.run()
            engine.close()
            found[run] = list(recording)
    return found


def put(name: str, change: Callable[[Any], Any]) -> Change:
    """Replace an argument by what `change` makes of it."""

    def apply(arguments: Arguments) -> None:
        arguments[name] = change(arguments.get(name))

    return apply


def value(name: str, new: Any) -> Change:
    return put(name, lambda _: new)


def cast(name: str, dtype: torch.dtype) -> Change:
    return put(name, lambda tensor: tensor.to(dtype))


def on_host(name: str) -> Change:
    return put(name, lambda tensor: tensor.cpu())


def strided(name: str) -> Change:
    """The same numbers, every other element of a memory twice the size."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.stack((tensor, tensor), -1)
        return wide[..., 0]

    return put(name, spread)


def edit(name: str, index: Any, new: float) -> Change:
    """One element, in a copy."""

    def write(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[index] = new
        return changed

    return put(name, write)


FIA, SCATTER = "npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"
SPLIT, PAGED, RESHAPE = "_npu_paged_attention_splitfuse", "_npu_paged_attention", "_npu_reshape_and_cache"
ROUTE, MATMUL, FINAL = "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"
TND, BSND, BSH = ({"input_layout": layout} for layout in ("TND", "BSND", "BSH"))
VIOLATIONS: list[tuple[str, str, Arguments, Change, str]] = [
    # run, operator, which of its calls, what is changed, what is said
    ("TND", FIA, TND, on_host("query"), "query is not on the device"),
    ("TND", FIA, TND, cast("query", torch.float32), "query is torch.float32"),
    ("TND", FIA, TND, cast("key", torch.bfloat16), "key is torch.bfloat16"),
    ("TND", FIA, TND, strided("query"), "query is not contiguous"),
    ("TND", FIA, TND, strided("key"), "key is not contiguous"),
    ("TND", FIA, TND, put("query", lambda q: q.unsqueeze(0)), "query has shape"),
    ("TND", FIA, TND, put("query", lambda q: q[..., :64].contiguous()), "head size 64 in TND"),
    ("TND", FIA, TND, value("input_layout", "NTD"), "layout NTD"),
    ("TND", FIA, TND, value("actual_seq_lengths", torch.tensor([1, 10])), "actual_seq_lengths is not a list of ints"),
    ("TND", FIA, TND, put("actual_seq_lengths", lambda ends: [0, *ends]), "is not cumulative"),
    ("TND", FIA, TND, put("actual_seq_lengths", lambda ends: [*ends, ends[-1] - 1]), "is not cumulative"),
    (
        "TND",
        FIA,
        TND,
        put("actual_seq_lengths", lambda ends: [*ends[:-1], ends[-1] - 1]),
        "there are 140 rows (561002)",
    ),
    ("TND", FIA, TND, value("actual_seq_lengths_kv", None), "actual_seq_lengths_kv is not a list of ints"),
    ("TND", FIA, TND, put("actual_seq_lengths_kv", lambda lens: [*lens, 1]), "KV lengths for"),
    ("TND", FIA, TND, put("actual_seq_lengths_kv", lambda lens: [n + 1000 for n in lens]), "columns, a context of"),
    ("TND", FIA, TND, put("actual_seq_lengths_kv", lambda lens: [1] * len(lens)), "more queries than keys"),
    ("TND", FIA, TND, cast("block_table", torch.int64), "block_table is torch.int64"),
    ("TND", FIA, TND, on_host("block_table"), "block_table is not on the device"),
    ("TND", FIA, TND, put("block_table", lambda table: table[0]), "block_table has shape"),
    ("TND", FIA, TND, put("block_table", lambda table: torch.cat((table, table))), "block_table has 2 rows"),
    ("TND", FIA, TND, edit("block_table", (0, 0), 99), "block_table names blocks that do not exist"),
    ("TND", FIA, TND, value("block_table", None), "block_size without block_table"),
    ("TND", FIA, TND, value("block_size", 64), "block_size is 64, blocks have 128 tokens"),
    ("TND", FIA, TND, value("atten_mask", None), "sparse_mode 3 without atten_mask"),
    ("TND", FIA, TND, put("atten_mask", lambda mask: mask[:1024, :1024].contiguous()), "mask [1024, 1024]"),
    ("TND", FIA, TND, cast("atten_mask", torch.float16), "atten_mask is torch.float16"),
    ("TND", FIA, TND, put("atten_mask", lambda mask: 1 - mask), "mask is not 1 above the diagonal"),
    ("TND", FIA, TND, value("sparse_mode", 2), "sparse_mode 2"),
    ("TND", FIA, TND, value("sparse_mode", 0), "a mask with sparse_mode 0"),
    ("TND", FIA, TND, value("num_heads", 2), "num_heads is 2, query has 4"),
    ("TND", FIA, TND, value("num_key_value_heads", 3), "4 heads on 3 KV heads"),
    ("TND", FIA, TND, value("num_key_value_heads", 1), "keys are 256 wide for 1 KV heads of 128"),
    ("TND", FIA, TND, value("scale", 1.0), "scale 1.0"),
    ("BSND", FIA, BSND, put("query", lambda q: q[0]), "query has shape"),
    ("BSND", FIA, BSND, put("actual_seq_lengths", lambda lens: [n + 1 for n in lens]), "actual_seq_lengths"),
    ("BSND", FIA, BSND, value("key", None), "key is not on the device"),
    ("BSND", FIA, BSH, value("sparse_mode", 3), "sparse_mode 3 without atten_mask"),
    ("BSND", FIA, BSH, value("actual_seq_lengths_kv", [9, 9, 9]), "3 KV lengths for"),
    ("BSND", FIA, BSH, value("num_heads", 3), "3 heads on 2 KV heads"),
    ("TND", SCATTER, {}, value("cache_mode", "PA_NZ"), "cache_mode is PA_NZ"),
    ("TND", SCATTER, {}, strided("key"), "key is not contiguous"),
    ("TND", SCATTER, {}, strided("value"), "value is not contiguous"),
    ("TND", SCATTER, {}, cast("key", torch.bfloat16), "value is torch.float16"),
    ("TND", SCATTER, {}, cast("slot_mapping", torch.float32), "slot_mapping is torch.float32"),
    ("TND", SCATTER, {}, edit("slot_mapping", 0, -1), "slots outside the cache"),
    ("TND", SCATTER, {}, edit("slot_mapping", 0, 8 * 128), "slots outside the cache"),
    ("TND", SCATTER, {}, put("slot_mapping", torch.zeros_like), "slots are not all different"),
    ("TND", SCATTER, {}, put("slot_mapping", lambda slots: slots[1:]), "slots for 140 tokens"),
    ("TND", SCATTER, {}, put("key_cache", lambda cache: cache.flatten(2)), "key_cache has shape"),
    ("TND", SCATTER, {}, put("key_cache", lambda cache: cache.view(8, 128, 4, 64)), "cache [8, 128, 4, 64] for"),
    ("TND", "npu_rms_norm", {}, cast("gamma", torch.float32), "gamma is torch.float32"),
    ("TND", "npu_rms_norm", {}, put("gamma", lambda gamma: gamma[1:]), "gamma [63] for"),
    ("TND", "npu_rotary_mul", {}, put("input", lambda x: x[0]), "input has shape"),
    ("TND", "npu_rotary_mul", {}, put("r1", lambda cos: cos[..., :64].contiguous()), "cosines [1, 140, 1, 64]"),
    ("TND", "npu_rotary_mul", {}, put("r1", lambda cos: cos + 1), "cosines or sines beyond 1"),
    ("TND", "npu_rotary_mul", {}, edit("r2", (..., 0), 0.5), "the halves of sin differ"),
    ("TND", "npu_swiglu", {}, put("input", lambda x: x[:, 1:].contiguous()), "[140, 191] along -1"),
    ("310P", "npu_swiglu", {}, put("input", lambda x: x[:, 16:].contiguous()), "[140, 176] along -1"),
    ("310P", "npu_swiglu", {}, cast("input", torch.bfloat16), "input is bfloat16 on 310P"),
    ("310P", RESHAPE, {}, cast("slot_indices", torch.int64), "slot_indices is torch.int64"),
    ("310P", RESHAPE, {}, edit("slot_indices", 0, -1), "slots outside the cache"),
    ("310P", RESHAPE, {}, strided("key"), "key or value is not contiguous"),
    ("310P", RESHAPE, {}, put("key_cache", torch.clone), "cache is not in NZ format"),
    ("310P", SPLIT, {}, cast("seq_len", torch.int64), "seq_len is torch.int64"),
    ("310P", SPLIT, {}, put("seq_len", lambda lens: lens.to("npu")), "seq_len is not on the host"),
    ("310P", SPLIT, {}, put("seq_len", lambda lens: lens - 1), "lengths add up to 139, there are 140 rows"),
    ("310P", SPLIT, {}, on_host("context_lens"), "context_lens is not on the device"),
    ("310P", SPLIT, {}, put("mask", lambda mask: mask / -10000), "mask is not -10000 above the diagonal"),
    ("310P", SPLIT, {}, put("mask", lambda mask: mask.to(torch.int8)), "mask is torch.int8"),
    ("310P", PAGED, {}, cast("context_lens", torch.int64), "context_lens is torch.int64"),
    ("310P", PAGED, {}, put("out", lambda out: out[:1].contiguous()), "out or num_heads"),
    ("310P", PAGED, {}, value("num_heads", 2), "out or num_heads"),
    ("310P", PAGED, {}, edit("block_table", (0, 0), -1), "block_table names blocks that do not exist"),
    ("MoE", ROUTE, {}, cast("expert_idx", torch.int64), "expert_idx is torch.int64"),
    ("MoE", ROUTE, {}, edit("expert_idx", (0, 0), 8), "experts out of range"),
    ("MoE", ROUTE, {}, value("expert_tokens_num_type", 0), "counts per expert"),
    ("MoE", ROUTE, {}, value("expert_tokens_num_flag", False), "counts per expert"),
    ("MoE", ROUTE, {}, value("active_expert_range", [0, 4]), "active_expert_range [0, 4]"),
    ("MoE", ROUTE, {}, value("active_num", 1), "active_num 1"),
    ("MoE", MATMUL, {}, cast("group_list", torch.int32), "group_list is torch.int32"),
    ("MoE", MATMUL, {}, value("group_list_type", 0), "group sizes"),
    ("MoE", MATMUL, {}, value("split_item", 0), "groups of rows into one result"),
    ("MoE", MATMUL, {}, value("group_type", None), "groups of rows into one result"),
    ("MoE", MATMUL, {}, put("weight", lambda each: list(each[0].unbind(0))), "one tensor of each"),
    ("MoE", MATMUL, {}, put("group_list", lambda sizes: sizes + 1), "group sizes"),
    ("MoE", FINAL, {}, value("drop_pad_mode", 0), "drop_pad_mode 0"),
    ("MoE", FINAL, {}, cast("scales", torch.float32), "scales is torch.float32"),
    ("MoE", FINAL, {}, cast("expanded_src_to_dst_row", torch.int64), "expanded_src_to_dst_row is torch.int64"),
    ("MoE", FINAL, {}, put("expanded_src_to_dst_row", torch.zeros_like), "places are not a permutation"),
]


@pytest.mark.parametrize(("run", "name", "where", "change", "said"), VIOLATIONS)
def test_a_violation_is_caught(
    calls: dict[str, list[Any]], run: str, name: str, where: Arguments, change: Change, said: str
) -> None:
    """The call as the engine made it passes; with one thing changed the operator says what is wrong."""
    family, _ = RUNS[run]
    found = [call for call in calls[run] if call.name == name and where.items() <= call.arguments.items()]
    call = found[-1 if where == BSH else 0]
    with plugged(family) as torch_npu, torch.inference_mode():
        operator = getattr(torch_npu, name)
        arguments = dict(call.arguments)
        operator(**arguments)
        change(arguments)
        with pytest.raises(torch_npu.ContractError, match=re.escape(f"{name}: ") + ".*" + re.escape(said)):
            operator(**arguments)


@pytest.mark.parametrize(("run", "other"), [("TND", "310P"), ("BSND", "310P"), ("310P", "A2")])
def test_operators_of_other_chips_are_caught(calls: dict[str, list[Any]], run: str, other: str) -> None:
    """The fused operators are not on 310P; the transformer library's are used nowhere else."""
    found = [call for call in calls[run] if "attention" in call.name or "cache" in call.name]
    assert found
    with plugged(other) as torch_npu:
        for call in found:
            with pytest.raises(torch_npu.ContractError, match=f"not on {other}|used on 310P only"):
                getattr(torch_npu, call.name)(**call.arguments)


def test_tensors_of_the_host_do_not_mix(tmp_path: Path) -> None:
    """Plain torch operators fail where one tensor was left on the host, as they do on hardware."""
    with plugged():
        ours = torch.ones(2, 3, device="npu")
        with pytest.raises(RuntimeError, match="tensors of npu:0 and cpu"):
            torch.mm(ours, torch.ones(3, 2))
        assert torch.equal((ours + ours).cpu(), torch.full((2, 3), 2.0))
        part = ours[:, 1]
        part.zero_()
        assert ours.tolist() == [[1, 0, 1], [1, 0, 1]]
