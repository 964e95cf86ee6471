"""Whatever a user gets wrong is one line on standard error and exit code 2."""

from pathlib import Path

import pytest

from tests.experiments.conftest import Command
from tests.experiments.small import ONE_BY_ONE, SIM

NULL_RUN = ("backend=real", "backend.device=null", "model=tiny_llama", "engine=small", "hardware=cpu")
GUESSING = (*NULL_RUN, "backend.device=cpu", "engine.speculative_tokens=3")

WRONG = {
    "unknown command": (["frobnicate"], "unknown command 'frobnicate': allowed are run, sweep, replay"),
    "unknown option": (["run", "--fast"], "unknown option '--fast'"),
    "unknown policy": (["run", "dispatch=best"], "Available options in 'dispatch': deepflow least_outstanding"),
    "unknown group": (["run", "colour=red"], "Could not override 'colour'"),
    "unknown key": (["run", "trace.rat=2"], "Could not override 'trace.rat'"),
    "no override": (["run", "fast"], "fast"),
    "bad override": (["run", "fleet.groups=[a"], "no viable alternative"),
    "negative rate": (["run", "trace.rate=-1"], "trace.rate is -1: allowed is a factor above 0"),
    "rate of zero": (["run", "trace.rate=0"], "trace.rate is 0: allowed is a factor above 0"),
    "rate in words": (["run", "trace.rate=fast"], "trace: Expected `float`, got `str` - at `$.rate`"),
    "seed in words": (["run", "seed=lucky"], "config: Expected `int`, got `str` - at `$.seed`"),
    "negative seed": (["run", "seed=-1"], "seed is -1: allowed is a whole number from 0 up"),
    "negative report period": (["run", "backend.report_period_s=-1"], "backend.report_period_s is -1"),
    "negative warm-up": (["run", "warmup_s=-1"], "warmup_s is -1"),
    "negative objective": (["run", "slo.ttft_s=-1"], "slo.ttft_s is -1"),
    "too few hosts": (
        ["run", "backend.hosts=1", "fleet.groups.0.npus=8"],
        "backend.hosts is 1: colocated executor 2 of llama3-8b, which takes 8 NPUs, has no room",
    ),
    "no fan-out": (["run", "coldstart.fork_fanout=0"], "fork_fanout is 0"),
    "negative start-up": (["run", "coldstart.te_pre_load_s=-1"], "te_pre_load_s is -1"),
    "negative delay": (["run", "backend.delays.event_s=-1"], "delays.event_s is -1"),
    "negative failure time": (["run", "backend.failures=[{at_s: -1, executor: te-0}]"], "failure of te-0 at -1"),
    "no attempts": (["run", "max_attempts=0"], "max_attempts is 0"),
    "no job executor": (["run", "job_executors=0"], "job_executors is 0"),
    "no duration": (["run", "trace.duration_s=0"], "duration_s is 0: allowed is more than 0 seconds"),
    "missing trace": (["run", "trace=deepflow", "trace.reader.path=x.jsonl"], "x.jsonl: there is no such trace file"),
    "trace not named": (["run", "trace=deepflow"], "trace.reader.path has no value: set it, as in trace.reader.path="),
    "empty trace": (["run", "trace=deepflow", "trace.reader.path=empty.csv"], "empty.csv"),
    "header only": (["run", "trace=deepflow", "trace.reader.path=header.csv"], "header.csv: the trace has no rows"),
    "truncated trace": (["run", "trace=deepflow", "trace.reader.path=cut.jsonl"], "cut.jsonl:2: "),
    "duplicate ids": (["run", "trace=deepflow", "trace.reader.path=twice.jsonl"], "twice.jsonl:2: "),
    "model too large": (["run", "hardware.hbm_bytes=1e9"], "model llama3-8b does not fit 1 x Ascend 910B2"),
    "zero executors": (["run", "fleet.groups.0.executors=0"], "fleet.groups[0] has zero executors"),
    "no groups": (["run", "fleet.groups=[]"], "the fleet has no executors"),
    "unknown role": (["run", "fleet.groups=[{role: both, executors: 1}]"], "Invalid enum value 'both'"),
    "decode alone": (["run", "fleet.groups=[{role: decode, executors: 1}]"], "only decode executors"),
    "prefill alone": (
        ["run", "fleet.groups=[{role: colocated, executors: 1}, {role: prefill, executors: 1}]"],
        "only colocated and prefill executors",
    ),
    "twice the same group": (
        ["run", "fleet.groups=[{role: colocated, executors: 1}, {role: colocated, executors: 2}]"],
        "fleet.groups[1] is another group of colocated executors",
    ),
    "heads that cannot be split": (
        ["run", "fleet.groups.0.npus=3"],
        "its 32 heads (8 of the KV cache) cannot be split",
    ),
    "stages that do not divide": (
        ["run", "fleet.groups.0.npus=4", "+fleet.groups.0.pipeline_stages=3"],
        "3 pipeline stages of 1 attention groups need a multiple of 3 NPUs",
    ),
    "stages of real engines": (
        ["run", *NULL_RUN, "fleet.groups.0.npus=2", "+fleet.groups.0.pipeline_stages=2"],
        "real engines have neither pipeline stages nor attention groups",
    ),
    "more executors than NPUs": (["run", "+fleet.npus=2"], "the executors a run starts with take 4: raise it"),
    "NPUs in words": (["run", "+fleet.npus=many"], "fleet.npus: Expected `int | null`"),
    "model that is none": (["run", "+fleet.groups.0.model=gpt9"], "fleet.groups[0].model is 'gpt9': allowed are"),
    "negative copies": (["run", "+fleet.groups.0.copies=-1"], "copies is -1: allowed are 0"),
    "no tenants": (["run", "mix=by_tenant"], "request 0 has no tenant"),
    "negative exponent": (["run", "mix=zipf", "mix.exponent=-1"], "exponent is -1: allowed is 0"),
    "graph of nothing": (["run", "latency.graph_sizes=[0]"], "latency.graph_sizes are [0]"),
    "no tokenizer": (["run", "backend.delays.tokenizers=0"], "delays.tokenizers is 0: allowed are 1 and more"),
    "experiment that is none": (["run", "experiment=nothing"], "Available options in 'experiment': cluster_day"),
    "wrong block size": (["run", "engine.block_tokens=17"], "block_tokens is 17: allowed are multiples of 16"),
    "missing profile": (["run", "latency=profile", "latency.path=p.json"], "profile p.json does not exist"),
    "profile not named": (["run", "latency=profile"], "latency.path has no value: set it, as in latency.path="),
    "broken profile": (["run", "latency=profile", "latency.path=cut.jsonl"], "profile cut.jsonl: "),
    "missing heat map": (
        ["run", "dispatch=deepflow", "dispatch.heat_map.path=h.json"],
        "heat map h.json does not",
    ),
    "no such module": (["run", "dispatch._target_=no.such.Policy"], "dispatch: Error loading 'no.such.Policy'"),
    "no such class": (["run", "dispatch._target_=policies.dispatch.round_robin.Best"], "dispatch: Error loading"),
    "not a policy": (["run", "dispatch._target_=collections.Counter"], "is not a cluster.policy.DispatchPolicy"),
    "not a scaling policy": (["run", "scaling._target_=collections.Counter"], "is not a cluster.policy.ScalingPolicy"),
    "unknown argument": (["run", "+dispatch.speed=9"], "unexpected keyword argument 'speed'"),
    "refused argument": (["run", "dispatch=deepflow", "dispatch.balance_ratio=0"], "balance_ratio is 0"),
    "weights of a large model": (["run", "backend=real"], "model llama3-8b has no weights"),
    "no model folder": (["run", *NULL_RUN, "backend.device=cpu", "model.folder=nowhere"], "model.folder is nowhere"),
    "guesses below 0": (["run", *NULL_RUN, "engine.speculative_tokens=-1"], "speculative_tokens is -1: allowed are 0"),
    "guesses that do not fit": (["run", *NULL_RUN, "engine.speculative_tokens=9"], "token_budget 128 is below"),
    "guesses by nobody": (["run", *NULL_RUN, "engine.drafter=luck"], "engine: Invalid enum value 'luck'"),
    "guesses by no model": (["run", *GUESSING, "engine.drafter=model"], "backend.draft_model names none"),
    "draft model missing": (
        ["run", *GUESSING, "engine.drafter=model", "backend.draft_model=nowhere"],
        "backend.draft_model is nowhere: there is no config.json",
    ),
    "layers of a real engine": (["run", *NULL_RUN, "engine.kv_transfer=by_layer"], "take by_chunk, or backend=sim"),
    "layers of nothing": (
        ["run", "engine.kv_transfer=by_hand"],
        "`$.kv_transfer`: allowed are by_request, by_chunk, by_layer",
    ),
    "draft model for nothing": (["run", *GUESSING, "backend.draft_model=x"], "is x, but nothing uses it"),
    "negative step": (["run", *NULL_RUN, "backend.step_s=-1"], "backend.step_s is -1"),
    "folder in a file": (["run", *SIM, "out=empty.csv/run"], "empty.csv/run"),
    "config folder missing": (["run", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
    "config folder not named": (["run", "--config-dir"], "--config-dir needs a folder"),
    "nothing to sweep": (["sweep", "trace.rate=1"], "nothing to sweep over"),
    "sweep over the unknown": (["sweep", "dispatch=best,worst"], "Could not find 'dispatch/best'"),
    "sweep over an unknown key": (["sweep", "nokey=1,2"], "Could not override 'nokey'"),
    "sweep with a wrong value": (["sweep", "trace.rate=-1,-2", ONE_BY_ONE], "trace.rate is -1"),
    "replay of nothing": (["replay"], "name the folder of one finished run"),
    "replay of two": (["replay", "a", "b"], "name the folder of one finished run"),
    "replay of another folder": (["replay", "."], "holds no config.yaml"),
    "demo with a wish": (["demo", "seed=1"], "the demo takes none"),
    "heat map with a seed in words": (["heatmap", "out.json", "seed=lucky"], "config: Expected `int`, got `str`"),
    "profile with a length in words": (["profile", "profile_max_prompt=long"], "config: Expected `int`, got `str`"),
    "heat map without a file": (["heatmap"], "name the file to write first"),
    "validate with an option": (["validate", "--fast"], "unknown option '--fast'"),
    "profile with an unknown key": (["profile", "nokey=1"], "Could not override 'nokey'"),
    "generate without a prompt": (["generate"], "the following arguments are required: --prompt"),
    "generate with a negative top_p": (["generate", "sampling.top_p=-1", "--prompt", "x"], "sampling: top_p is -1.0"),
    "generate with where to end": (
        ["generate", "+sampling.stop=x", "--prompt", "x"],
        "sampling.stop: allowed are temp",
    ),
    "generate with no stop": (["generate", "--prompt", "x", "--stop", ""], "strings that are not empty"),
    "generate without a model": (["generate", "nowhere", "--prompt", "x"], "there is no config.json"),
    "sampling at no temperature": (["run", *NULL_RUN, "sampling.temperature=-1"], "sampling: temperature is -1.0"),
    "sampling in words": (["run", "sampling.top_k=many"], "sampling: Expected `int`, got `str` - at `$.top_k`"),
    "traces without a command": (["traces"], "the following arguments are required: command"),
    "traces with another command": (["traces", "sort"], "invalid choice: 'sort'"),
    "statistics of nothing": (["traces", "stats", "x.csv"], "x.csv: there is no such trace file"),
    "statistics of a cut trace": (["traces", "stats", "cut.jsonl"], "cut.jsonl:2: "),
    "unknown format": (["traces", "stats", "cut.jsonl", "--format", "best"], "the trace format is 'best': allowed is"),
    "conversion to another format": (["traces", "convert", "one.jsonl", "out.xls"], "out.xls"),
    "generator like nothing": (["traces", "generate", "nothing", "out.csv"], "profile is 'nothing': allowed is one of"),
    "generator at no rate": (["traces", "generate", "azure2023_conv", "out.csv", "--rate", "0"], "rate is 0"),
}


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Traces that are broken in various ways."""
    row = '{"request_id":4,"arrival_s":0,"prompt_tokens":20,"output_tokens":4}\n'
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("arrival_s,prompt_tokens,output_tokens\n")
    (tmp_path / "one.jsonl").write_text(row)
    (tmp_path / "twice.jsonl").write_text(row * 2)
    (tmp_path / "cut.jsonl").write_text(row + row[:30])


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=list(WRONG))
def test_an_error_is_one_line(deepflow: Command, arguments: list[str], message: str) -> None:
    """The line says what is wrong; the exit code is 2; nothing else is printed."""
    quiet = ["progress=false"] if arguments[0] == "run" else []
    said = deepflow(arguments[0], *quiet, *arguments[1:])
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("deepflow: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "what", ["model too large", "zero executors", "missing profile", "not a policy", "negative rate"]
)
def test_an_error_leaves_no_folder(deepflow: Command, what: str) -> None:
    """A run that never began leaves no folder behind."""
    assert deepflow(*WRONG[what][0]).code == 2
    assert not Path("runs").exists()


def test_errors_of_the_program_are_not_hidden(deepflow: Command, tmp_path: Path) -> None:
    """An exception that is no user's error comes with its traceback."""
    (tmp_path / "broken_policy.py").write_text(
        "from cluster.policy import DispatchPolicy\n"
        "class Broken(DispatchPolicy):\n"
        "    def place(self, task, fleet, now_ns):\n"
        "        return fleet.nonsense\n"
    )
    with pytest.raises(AttributeError, match="nonsense"):
        deepflow("run", *SIM, "dispatch._target_=broken_policy.Broken")
