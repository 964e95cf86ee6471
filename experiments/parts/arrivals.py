"""What a run is asked to do: the trace, cut, scaled and mixed, and jobs beside it."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from cluster.work import AnyArrival
from experiments.config import build, plain
from experiments.models import model_name, served


class Workload(NamedTuple):
    """Arrivals, and where they come from, for the report."""

    arrivals: Iterable[AnyArrival]
    source: str
    stand_in: bool


def workload(cfg: DictConfig) -> Workload:
    """The configured trace, cut and scaled; its fitted stand-in where no file is found, which `source` then says."""
    from traces.catalog import find
    from traces.merge import Merge
    from traces.synthetic import SyntheticTrace
    from traces.transforms import ClipLengths, LengthScale, Limit, RateScale, TimeWindow

    trace, model = cfg.trace, model_name(cfg)
    sources = job_sources(cfg, model)
    if trace.reader is None and trace.stand_in is None:
        if not sources:
            raise ValueError("the run has no requests: give it a trace or jobs, e.g. trace=azure2023_conv jobs=agents")
        return Workload(Merge(sources), "jobs only", False)
    stand_in = trace.reader is None or (
        trace.stand_in is not None
        and not Path(str(trace.reader.path)).is_file()
        and find(str(trace.reader.path)) is None
    )
    arrivals: Iterable[AnyArrival]
    if stand_in:
        span_s = (trace.start_s + (trace.duration_s or 600.0)) * max(trace.rate, 1e-9)
        arrivals = SyntheticTrace(trace.stand_in, trace.stand_in_rate, span_s, model, cfg.seed, trace.max_tokens)
        source = f"generated like {trace.stand_in} ({trace.stand_in_rate} requests/s, seed {cfg.seed})"
        if trace.reader is not None:
            source += f": a stand-in, because no file {trace.reader.path} was found (set DEEPFLOW_TRACES)"
    else:
        arrivals = build(trace.reader, "trace", model=model, max_tokens=trace.max_tokens)
        source = str(trace.name)
    if not trace.rate > 0:
        raise ValueError(f"trace.rate is {trace.rate}: allowed is a factor above 0 (1 keeps the trace's own rate)")
    if trace.rate != 1:
        arrivals = RateScale(arrivals, factor=trace.rate)
    if trace.start_s or trace.duration_s is not None:
        arrivals = TimeWindow(arrivals, trace.start_s, trace.duration_s)
    if trace.prompt_scale != 1 or trace.output_scale != 1:
        arrivals = LengthScale(arrivals, trace.prompt_scale, trace.output_scale)
    if trace.max_prompt_tokens is not None or trace.max_output_tokens is not None:
        arrivals = ClipLengths(arrivals, trace.max_prompt_tokens, trace.max_output_tokens)
    if trace.limit is not None:
        arrivals = Limit(arrivals, trace.limit)
    if cfg.mix["_target_"] is not None:
        how = {**plain(cfg.mix), "_partial_": True, "_convert_": "all"}
        arrivals = build(how, "mix", models=list(served(cfg)), seed=cfg.seed)(arrivals)
    if sources:
        arrivals = Merge([arrivals, *sources])
    return Workload(arrivals, source, stand_in and trace.reader is not None)


def job_sources(cfg: DictConfig, model: str) -> list[Iterable[AnyArrival]]:
    """The workloads of `jobs`: work other than serving, beside the trace."""
    return [
        build(source, f"jobs.sources[{number}]", model=model, seed=cfg.seed)
        for number, source in enumerate(cfg.jobs.sources)
    ]


def rate_from(arrivals: Iterable[AnyArrival], since_ns: int, rate: float, before: float) -> Iterable[AnyArrival]:
    """What comes from then on at another `trace.rate`."""
    from traces.transforms import RateFrom

    if not rate > 0:
        raise ValueError(f"trace.rate is {rate}: allowed is a factor above 0 (1 keeps the trace's own rate)")
    return RateFrom(arrivals, since_ns, rate / before)
