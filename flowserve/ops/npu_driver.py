"""Loading torch_npu, and which family of Ascend chips it finds. The only place that knows how that can fail."""

import importlib
import importlib.util
from enum import StrEnum
from typing import Any

SET_ENV = "source CANN's set_env.sh (as in `source /usr/local/Ascend/ascend-toolkit/set_env.sh`) in this shell"


class Family(StrEnum):
    """Chips that share operators and their limits."""

    A2 = "A2"
    A3 = "A3"
    INFERENCE = "310P"


_SOC_VERSIONS = {Family.A2: range(220, 226), Family.A3: range(250, 256), Family.INFERENCE: range(200, 206)}


def load_torch_npu() -> Any:
    """The torch_npu module. Raises ValueError, naming the fix, where it is not there or does not load."""
    try:
        return importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":
            raise ValueError(f"torch_npu does not load, Python module {error.name} is missing: install it") from error
        raise ValueError(
            "device npu needs torch_npu, which is not installed: install the release that goes with this torch, in the "
            "checkout by `pip install '.[npu]'`"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"torch_npu is installed but does not load: {error}. {SET_ENV[0].upper()}{SET_ENV[1:]}; to use this "
            "environment without the NPU, set TORCH_DEVICE_BACKEND_AUTOLOAD=0, or `import torch` fails too"
        ) from error


def is_installed() -> bool:
    """Whether there is a torch_npu to import, working or not."""
    return importlib.util.find_spec("torch_npu") is not None


def open_runtime() -> Any:
    """The module of device calls, `torch.npu`."""
    return load_torch_npu().npu


def chip_family(torch_npu: Any) -> Family:
    """The family of the current device. Raises ValueError for one that the operators here are not written for."""
    version = torch_npu.npu.get_soc_version()
    for family, versions in _SOC_VERSIONS.items():
        if version in versions:
            return family
    raise ValueError(
        f"the NPU {torch_npu.npu.get_device_name()} (SoC version {version}) is not supported: Ascend 910B (A2), 910C "
        "(A3) and 310P are"
    )
