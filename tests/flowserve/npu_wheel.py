"""Run in an environment with the real torch_npu on stand-ins for the CANN libraries, where kernels compute nothing.

`bind CALLS`: binds recorded operator calls to the wheel's schemas and runs its meta kernels. `serve MODEL`: the engine
on real tensors of the device, kernels computed on the host by the operators' references, and the same on the CPU.
`updates OPERATOR`: what graphs may update. Prints JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.flowserve import npu_operators
from tests.flowserve.npu_tensor import NpuTensor, host


def bind(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per call: `error` of the wheel, or the shapes and dtypes that its meta kernel says (None where it has none)."""
    answers = []
    for call in calls:
        name = call["name"]
        space = torch.ops.npu if hasattr(torch.ops.npu, name) else torch.ops.atb
        try:
            result = getattr(space, name)(**{key: to_meta(value) for key, value in call["arguments"].items()})
            answers.append({"result": describe(result)})
        except NotImplementedError:  # the arguments were taken, there is no meta kernel to run
            answers.append({"result": None})
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    return answers


def to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device="meta")
    return [to_meta(each) for each in value] if isinstance(value, list) else value


def describe(value: Any) -> Any:
    """Tensors as shape and dtype, the rest as it is: what JSON carries."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return [describe(each) for each in value] if isinstance(value, list | tuple) else value


class HostKernels(TorchDispatchMode):
    """Operators on NPU tensors are computed on the host and copied back; views stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # composite operators come whole in this mode
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        ours = [leaf for leaf in tree_leaves((args, kwargs)) if is_npu(leaf)]
        wanted = kwargs.get("device")
        target = torch.device(wanted) if wanted is not None else None
        if not ours and (target is None or target.type != "npu"):
            return func(*args, **kwargs)
        returns = func._schema.returns
        if returns and all(each.alias_info is not None and not each.alias_info.is_write for each in returns):
            return func(*args, **kwargs)
        space, name = func.namespace, func._schema.name.split("::")[1]
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        memories = {memory.data_ptr(): download(memory) for memory in (leaf.untyped_storage() for leaf in ours)}

        def to_host(leaf: Any) -> Any:
            if not is_npu(leaf):
                return leaf
            memory = memories[leaf.untyped_storage().data_ptr()]
            return memory.view(leaf.dtype).as_strided(leaf.size(), leaf.stride(), leaf.storage_offset())

        if space == "npu" and name == "_npu_dtype_cast":
            out: Any = to_host(args[0]).to(args[1])
        elif space in ("npu", "atb"):
            self.operators.add(name)
            reference = npu_operators.OPERATORS[name]
            result = reference(*tree_map(lambda leaf: wrapped(leaf, to_host), args), **kwargs_of(kwargs, to_host))
            out = tree_map(host, result)
        else:
            out = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
        written = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[number] if number < len(args) else kwargs.get(argument.name)
                written += [leaf for leaf in tree_leaves(given) if is_npu(leaf)]
        for leaf in written:
            upload(memories[leaf.untyped_storage().data_ptr()], leaf)
        if written and returns:
            return written[0] if len(written) == 1 else tuple(written)
        if target is not None and target.type == "cpu":
            return out
        return tree_map(lambda leaf: to_device(leaf) if isinstance(leaf, Tensor) else leaf, out)


def wrapped(leaf: Any, to_host: Callable[[Any], Any]) -> Any:
    return NpuTensor(to_host(leaf)) if is_npu(leaf) else leaf


def kwargs_of(kwargs: dict[str, Any], to_host: Callable[[Any], Any]) -> Any:
    return tree_map(lambda leaf: wrapped(leaf, to_host), kwargs)


def is_npu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "npu"


def flat(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's memory."""
    memory = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory, 0, (memory.nbytes(),), (1,))


def download(memory: Any) -> Tensor:
    bytes_there = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory, 0, (memory.nbytes(),), (1,))
    return bytes_there.cpu()


def upload(memory: Tensor, leaf: Tensor) -> None:
    flat(leaf).copy_(memory)


def to_device(tensor: Tensor) -> Tensor:
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="npu")
    whole = torch.empty(out.untyped_storage().nbytes(), dtype=torch.uint8)
    whole.view(tensor.dtype).as_strided(tensor.size(), tensor.stride()).copy_(tensor)
    upload(whole, out)
    return out


def serve(folder: Path) -> dict[str, Any]:
    """Tokens of a few prompts on both devices, which operators of torch_npu were called, and what the runner says."""
    from tests.flowserve.driver import Engine, make_prompt

    prompts = [make_prompt(length, length) for length in (5, 140, 30)]

    def tokens(device: str, dtype: str) -> tuple[list[list[int]], str]:
        engine = Engine(folder, dtype, device, block_tokens=128, kv_blocks=12)
        tasks = [engine.add(prompt, 6) for prompt in prompts]
        engine.run()
        engine.close()
        return [engine.output[task] for task in tasks], engine.runner.about

    expected, _ = tokens("cpu", "float32")
    with HostKernels() as kernels:
        output, about = tokens("npu", "float16")
    return {"cpu": expected, "npu": output, "operators": sorted(kernels.operators), "about": about}


def updates(operator: str) -> list[str]:
    """Keys that `NPUGraph.update` takes for a captured operator."""
    from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

    return [key for _, _, key in _NPU_GRAPH_OP_HANDLERS[operator].get_update_specs(operator)]


if __name__ == "__main__":
    command, argument = sys.argv[1:]
    if command == "bind":
        print(json.dumps(bind(json.loads(Path(argument).read_text()))))
    else:
        print(json.dumps(serve(Path(argument)) if command == "serve" else updates(argument)))
