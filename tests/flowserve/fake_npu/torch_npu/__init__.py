"""Stand-in for torch_npu on machines without one: operators that hold the caller to their contracts, and a device.

Importing it registers the device `npu` with torch for the rest of the process, as the real package does.
"""

from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.flowserve.npu_operators import *  # noqa: F403
from tests.flowserve.npu_tensor import register_factories
from torch_npu.runtime import Runtime

npu = Runtime()
_setup_privateuseone_for_python_backend("npu", backend_module=npu)
_factories = register_factories()
