"""Every option of every group in conf/ composes, and builds the objects of a run that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from omegaconf import DictConfig, OmegaConf

from cluster.events import ExecutorReady
from cluster.policy import DispatchPolicy, ScalingPolicy
from cluster.recorder import Recorder
from cluster.work import FIRST_CALL, WorkArrival
from experiments import build
from experiments.config import CONF, compose
from policies.dispatch.least_outstanding import LeastOutstanding
from real.cluster import RealCluster
from sim.cluster import SimCluster
from tests.experiments.small import PROFILE

ROOT = CONF.parent
OPTIONS = sorted((file.parent.relative_to(CONF).as_posix(), file.stem) for file in CONF.glob("*/**/*.yaml"))

SPLIT = ["fleet.groups.0.npus=8"]
ON_REAL = ["model=tiny_llama", "engine=small", "hardware=cpu"]
NEEDS = {
    ("trace", "deepflow"): ["trace.reader.path={folder}/trace.jsonl"],
    ("latency", "profile"): ["latency.path={folder}/profile.json"],
    ("latency", "table"): ["latency.path={folder}/table.csv"],
    ("backend", "real"): ON_REAL,
    ("mix", "by_tenant"): ["trace=deepflow", "trace.reader.path={folder}/tenants.jsonl"],
    ("engine/chunking", "protect_tpot"): ["engine.chunking.prompt_token_s=5e-5"],
    ("hardware", "cpu"): ON_REAL[:2],
    ("jobs", "agents"): ["fleet=with_workers", "jobs.sources.0.sessions=1"],
    ("jobs", "fine_tuning"): ["fleet=with_workers"],
    ("jobs", "mixed"): ["fleet=with_workers", "jobs.sources.0.sessions=1"],
    ("trace", "claude_code"): ["fleet=with_workers", "trace.reader.path={folder}/session.json"],
    ("trace", "none"): ["fleet=with_workers", "jobs=fine_tuning"],
    ("model", "llama3_70b"): SPLIT,
    ("model", "codellama_34b"): SPLIT,
    ("model", "qwen2_72b"): SPLIT,
    ("model", "qwen2_5_32b"): SPLIT,
    ("model", "qwen2_5_72b"): SPLIT,
    ("model", "qwen3_32b"): SPLIT,
    ("model", "qwen3_30b_a3b"): SPLIT,
    ("model", "qwen3_235b_a22b"): ["fleet.groups.0.npus=16", "hardware=ascend910c"],
    ("model", "deepseek_v3"): ["fleet.groups.0.npus=32", "hardware=cloudmatrix384"],
}
"""What an option needs beside it: values that it leaves open (`???`), or options that go with it."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the files that options want to be told of."""
    (tmp_path / "trace.jsonl").write_text('{"arrival_s":0,"prompt_tokens":20,"output_tokens":4}\n')
    call = {"type": "n", "in": 70, "out": 5, "hash_ids": [1], "input_types": ["text"], "think_time": 1.0}
    session = {"id": "s", "block_size": 64, "requests": [call, {**call, "input_types": ["tool_result"]}]}
    (tmp_path / "session.json").write_bytes(msgspec.json.encode(session))
    rows = [f'{{"arrival_s":0,"prompt_tokens":20,"output_tokens":4,"tenant":"{tenant}"}}\n' for tenant in "abc"]
    (tmp_path / "tenants.jsonl").write_text("".join(rows))
    grid = "prefill,1,0,0.01\nprefill,9,0,0.02\ndecode,1,0,0.01\ndecode,9,0,0.01\n"
    (tmp_path / "table.csv").write_text("kind,tokens,context,duration_s\n" + grid)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(PROFILE))
    return tmp_path


def configure(group: str, option: str, folder: Path, *more: str) -> DictConfig:
    needs = [override.format(folder=folder) for override in NEEDS.get((group, option), [])]
    return compose([f"{group}={option}", *needs, *more])


def missing(node: Any, where: str = "") -> list[str]:
    """Keys that are `???`."""
    found = []
    for key in node:
        here = f"{where}.{key}" if where else str(key)
        if OmegaConf.is_missing(node, key):
            found.append(here)
        elif isinstance(node, DictConfig) and isinstance(node[key], DictConfig):
            found += missing(node[key], here)
    return found


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_the_table_covers_what_is_left_open(group: str, option: str) -> None:
    """Values that an option leaves to the user are those of the table above, so that every option is built here."""
    open_values = missing(compose([f"{group}={option}"]))
    given = [need.partition("=")[0] for need in NEEDS.get((group, option), [])]
    assert set(open_values) <= set(given)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_builds_and_runs(group: str, option: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option composes with the defaults, and workload, control plane and cluster made of it get through a run."""
    monkeypatch.setenv("DEEPFLOW_TRACES", str(files / "none"))
    monkeypatch.setenv("HOME", str(files))
    cfg = configure(group, option, files, "trace.limit=3", "max_attempts=2")
    build.check_types(cfg)
    build.objectives(cfg)
    workload = build.workload(cfg)
    assert workload.stand_in == (cfg.trace.stand_in is not None and cfg.trace.reader is not None)
    recorder = Recorder()
    control = build.control_plane(cfg, workload.arrivals, recorder)
    with build.cluster(cfg, files) as cluster:
        assert isinstance(cluster, RealCluster if cfg.backend.name == "real" else SimCluster)
        if isinstance(cluster, SimCluster):
            control.drive(cluster)
            assert set(recorder.outcomes) == {"finished"}
            served = [number for number in recorder.requests["request_id"] if number < FIRST_CALL]
            few = {("trace", "deepflow"): 1, ("trace", "none"): 0, ("trace", "claude_code"): 0}
            assert len(served) == few.get((group, option), 3)
            jobs = [] if control.work is None else control.work.recorder.rows
            assert {row.outcome for row in jobs} == ({"finished"} if cfg.jobs.sources or not served else set())


@pytest.mark.parametrize(
    "option", [option for group, option in OPTIONS if (group, option != "none") == ("trace", True)]
)
def test_traces_of_files(option: str, files: Path, trace_file: Callable[[str], Path]) -> None:
    """Where the files are there, a trace reads them."""
    from traces.catalog import KNOWN

    known = {"azure2023_poisson": "azure2023_conv"}.get(option, option)
    if known in KNOWN:
        trace_file(KNOWN[known].file)
    cfg = configure("trace", option, files)
    workload = build.workload(cfg)
    assert not workload.stand_in
    first = next(iter(workload.arrivals))
    assert first.request.model == build.model_name(cfg)
    assert isinstance(first, WorkArrival) == (option == "claude_code")


@pytest.mark.parametrize("fleet", [option for group, option in OPTIONS if group == "fleet"])
def test_fleets_of_processes(fleet: str, files: Path) -> None:
    """Every fleet gets ready on engine processes as well."""
    cfg = compose([f"fleet={fleet}", "backend=real", "backend.device=null", *ON_REAL, "trace=synthetic"])
    control = build.control_plane(cfg, build.workload(cfg).arrivals, Recorder())
    wanted = sum(group.initial for group in build.groups(cfg))
    ready = 0
    with build.cluster(cfg, files) as cluster:
        while ready < wanted:
            event = cluster.next_event()
            assert event is not None
            ready += isinstance(event, ExecutorReady)
            for action in control.on_event(event):
                cluster.submit(action)


def test_a_model_that_was_never_profiled_needs_a_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's weights are drawn once, into the user's cache folder, and found there again."""
    monkeypatch.setenv("HOME", str(files))
    cfg = compose(["backend=real", *ON_REAL])
    folder = Path(build.model_folder(cfg))
    assert files in folder.parents
    assert (folder / "model.safetensors").is_file()
    assert build.model_folder(cfg) == str(folder)
    assert build.model_folder(compose([f"model.folder={folder}"])) == str(folder)


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "model" and "tiny" in option])
def test_a_folder_says_the_shape_of_its_model(option: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are of the configured shape, and their folder, named for any model, gives that shape again."""
    monkeypatch.setenv("HOME", str(files))
    cfg = compose([f"model={option}"])
    folder = Path(build.model_folder(cfg))
    shape = build.model_shape(compose([f"model.folder={folder}"]))
    assert shape == msgspec.structs.replace(build.model_shape(cfg), name=folder.name)
    real = build.model_shape(compose(["backend=real", "backend.dtype=bfloat16", f"model.folder={folder}"]))
    assert real.bytes_per_value == 2


@pytest.mark.parametrize(
    ("group", "base"),
    [
        ("dispatch", DispatchPolicy),
        ("scaling", ScalingPolicy),
        *((f"engine/{name}", kind) for name, kind in build.ENGINE_POLICIES.items()),
    ],
)
def test_options_are_called_like_their_modules(group: str, base: type) -> None:
    """An option of policies names the module of the same name, and every module with a policy has an option."""
    options = {option for folder, option in OPTIONS if folder == group}
    key = group.replace("/", ".")
    targets = {option: str(OmegaConf.select(compose([f"{group}={option}"]), f"{key}._target_")) for option in options}
    assert {option: target.rpartition(".")[0] for option, target in targets.items()} == {
        option: f"policies.{key}.{option}" for option in options
    }
    modules = {
        file.stem for file in (ROOT / "policies" / group).glob("*.py") if f"({base.__name__})" in file.read_text()
    }
    assert modules == options


def test_defaults_are_the_first_example() -> None:
    """Without overrides, a run is the Azure conversation on four simulated 910B2."""
    cfg = compose()
    assert (cfg.backend.name, cfg.hardware.name, cfg.trace.name) == ("sim", "Ascend 910B2", "azure2023_conv")
    assert sum(group.initial for group in build.groups(cfg)) == 4
    (job_executor,) = build.control_plane(cfg, [], Recorder()).job_executors
    assert isinstance(job_executor.policy, LeastOutstanding)


def test_the_kv_layout_says_how_many_calls_a_transfer_takes() -> None:
    """One setting orders the engine's memory and sets the pieces of a simulated transfer: 64, or 1 for Llama 3 8B."""
    pieces = {}
    for layout in ("layer_major", "block_major"):
        cfg = compose(["fleet=pd_1p1d", f"engine.kv_layout={layout}"])
        node = build.sim_node(cfg)(build.groups(cfg)[0].spec)
        assert node.engine.kv_layout == layout
        pieces[layout] = node.kv_segments
    assert pieces == {"layer_major": 64, "block_major": 1}
