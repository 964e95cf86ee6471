"""Tensors of a device named npu that exists in Python only: each holds a host tensor that does its arithmetic.

A device of their own, so that an operator that mixes them with host tensors fails, as it would on hardware.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

ND, NZ = 2, 29
aten = torch.ops.aten
# Operators that take tensors of the host beside the device's.
MIXING = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Memory:
    """Bytes of tensors made on the device that have not been collected (their views may live longer), and the most."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def own(self, tensor: "NpuTensor") -> "NpuTensor":
        size = tensor.raw.untyped_storage().nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.held -= size


memory = Memory()


class NpuTensor(torch.Tensor):
    """`raw`: the host tensor. `format`: of its memory, ND or NZ."""

    raw: Tensor
    format: int

    @staticmethod
    def __new__(cls, raw: Tensor, format: int = ND) -> "NpuTensor":
        with torch.inference_mode(False):  # a view of a tensor from outside that mode must not be of it
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                raw.size(),
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device="npu:0",
            )
        self.raw = raw
        self.format = format
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"npu({self.raw!r})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = cls.compute(func, args, dict(kwargs))
        graph = capturing()
        if graph is not None:
            graph.record(func, args, kwargs, out)
        return out

    @classmethod
    def compute(cls, func: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.pop("device", None)
        if func is aten._to_copy.default:
            kwargs.pop("pin_memory", None)
            copy = func(args[0].raw, **kwargs)
            if device is None or torch.device(device).type == "npu":
                return NpuTensor(copy)
            refuse_in_capture("a copy to the host")
            return copy
        if func is aten.copy_.default:
            if not all(isinstance(each, NpuTensor) for each in args[:2]):
                refuse_in_capture("a copy between host and device")
            args[0].raw.copy_(host(args[1])) if isinstance(args[0], NpuTensor) else args[0].copy_(args[1].raw)
            return args[0]
        if func not in MIXING:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, NpuTensor) and leaf.dim():
                    raise RuntimeError(f"{func}: tensors of npu:0 and {leaf.device}, shape {list(leaf.shape)}")
        known = {id(leaf.raw): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, NpuTensor)}
        result = func(*tree_map(host, args), **tree_map(host, kwargs))
        return tree_map(lambda each: known[id(each)] if id(each) in known else wrap(each), result)


def capturing() -> Any:
    """The stand-in's graph that is being captured, if any."""
    return getattr(sys.modules["torch_npu"].npu, "capturing", None) if "torch_npu" in sys.modules else None


def refuse_in_capture(what: str) -> None:
    """Error 107030 of the runtime."""
    if capturing() is not None:
        raise RuntimeError(f"107030: the current capture mode does not support {what}")


def host(value: Any) -> Any:
    return value.raw if isinstance(value, NpuTensor) else value


def wrap(value: Any) -> Any:
    return NpuTensor(value) if isinstance(value, Tensor) else value


def register_factories() -> torch.library.Library:
    """How tensors come to be on the device; the registration lasts as long as the result."""
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, *rest: Any, **more: Any) -> Tensor:
        return memory.own(NpuTensor(torch.empty(size, dtype=dtype, device="cpu")))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *rest: Any, **more: Any) -> Tensor:
        return memory.own(NpuTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu")))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        refuse_in_capture("a copy between host and device")
        host(target).copy_(host(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library
