"""DistServe's simulation with as many instances as asked for: its own command line knows one of each kind.

Arguments: COLOCATED PREFILL DECODE [ARGUMENTS of simdistserve.benchmarks.simulate_dist ...]. Runs by the interpreter of
DistServe, see `timed_loop`.
"""

import sys
from functools import partial
from importlib import import_module
from typing import Any


def main(colocated: str, prefill: str, decode: str, *arguments: str) -> None:
    peer: Any = import_module("simdistserve.benchmarks.simulate_dist")
    peer.VLLMCluster = partial(peer.VLLMCluster, N_instance=int(colocated))
    peer.DisaggCluster = partial(peer.DisaggCluster, N_prefill_instance=int(prefill), N_decode_instance=int(decode))
    peer.main(peer.parse_args(list(arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
