"""What the prefix cache saves: TTFT of prompts that share 90 % of their tokens, with the cache against without."""

import time

import numpy as np

from experiments.bench.harness.engine import FlowServe
from experiments.bench.harness.result import Options as CommonOptions
from experiments.bench.harness.result import Row, median_row
from experiments.bench.harness.workload import Load, checkpoint, mixed_load
from flowserve.core.config import EngineConfig


class Options(CommonOptions, frozen=True, kw_only=True):
    """`prompt`: tokens of each; `shared`: the share that all begin with."""

    requests: int = 8
    prompt: int = 1024
    shared: float = 0.9


def run(options: Options) -> list[Row]:
    folder = checkpoint()
    common = int(options.prompt * options.shared)
    size = (options.prompt, options.prompt)
    drawn = mixed_load(options.requests * options.repeats + 1, size, (1, 1))
    prompts = [Load(drawn[0].prompt[:common] + load.prompt[common:], 1) for load in drawn]
    blocks = 2 * len(prompts) * options.prompt // 16
    engines = {
        cached: FlowServe(folder, EngineConfig(kv_blocks=blocks, prefix_cache=cached), threads=options.threads)
        for cached in (True, False)
    }
    for engine in engines.values():
        engine.serve(prompts[:1])
    ttft: dict[bool, list[float]] = {True: [], False: []}
    tokens: dict[bool, list[int]] = {True: [], False: []}
    for load in prompts[1:]:
        for cached, engine in engines.items():
            start = time.perf_counter()
            served = engine.serve([load])[0]
            ttft[cached].append(served.times_s[0] - start)
            tokens[cached] += served.tokens
    for engine in engines.values():
        engine.close()
    assert tokens[True] == tokens[False], "the cache changed a token"
    with_cache, without = (1e3 * float(np.median(ttft[cached])) for cached in (True, False))
    return [
        median_row(
            f"TTFT without / with cache, {options.shared:.0%} of {options.prompt} tokens shared",
            [a / b for a, b in zip(ttft[False], ttft[True], strict=True)],
            "x",
            f"{without:.0f} against {with_cache:.0f} ms, one request at a time",
            at_least=5,
        )
    ]
