"""Several models in one cluster, from the command line: who serves them, who asks for them, what is said of them."""

from pathlib import Path

import msgspec
import pytest

from cluster.vocabulary import Role
from cluster.work import FIRST_CALL, Train
from experiments import build, models
from experiments.config import compose
from experiments.outputs import read_requests, read_summary
from experiments.run import run
from tests.experiments.small import PROFILE

THREE = ("experiment=three_models", "progress=false", "trace=synthetic", "trace.duration_s=60")


def test_each_model_is_served_by_its_own_executors(tmp_path: Path) -> None:
    """Popular models are asked for more; each starts from zero when it is asked for, and goes back when nobody does."""
    cfg = compose(
        [
            *THREE,
            "slo=none",
            "scaling.down_delay_s=5",
            "trace.duration_s=200",
            "trace.rate=0.1",
            f"out={tmp_path}",
            "fleet.groups.1.executors=0",
        ]
    )
    result = run(cfg)
    names = ["qwen2.5-7b", "llama3-8b", "qwen2.5-32b"]
    assert list(result.models) == names
    requests = read_requests(tmp_path)
    assert set(requests.outcome) == {"finished"}
    assert [result.models[name]["requests"] for name in names] == [
        int((requests.model == name).sum()) for name in names
    ]
    assert sum(result.models[name]["npu_seconds"] for name in names) == pytest.approx(result.summary["npu_seconds"])
    # A token of the 32B on 4 NPUs takes longer than one of the 7B on one.
    assert result.models["qwen2.5-32b"]["tpot_p50_s"] > 1.3 * result.models["qwen2.5-7b"]["tpot_p50_s"]
    first = {name: requests[requests.model == name].sort_values("arrival_ns").iloc[0] for name in names}
    assert first["qwen2.5-7b"].ttft_s < 0.5
    assert first["llama3-8b"].ttft_s > 2.2, "it waited for an executor: 0.3 + 16.1 GB / 20 GB/s + 1.1 s"
    launched = {name: [spec for spec in result.recorder._specs.values() if spec.model == name] for name in names}
    assert {spec.npus for spec in launched["qwen2.5-32b"]} == {4}
    retired = sum(what == "retired" for _, _, what, _ in result.recorder.scaling)
    assert 3 <= retired < len(result.recorder._specs), "executors went when nobody asked, and came again"
    assert set(read_summary(tmp_path).provenance["models"]) == set(names)
    page = (tmp_path / "report.html").read_text()
    assert "By model" in page
    assert "3 models" in page


def test_copies_are_models_of_one_shape() -> None:
    """An entry of the fleet may stand for many models, each a group with a name of its own."""
    entry = "{role: colocated, model: llama3_8b, copies: 50, executors: 1}"
    cfg = compose([f"fleet.groups=[{entry}]"])
    plans = build.groups(cfg)
    assert [plan.spec.model for plan in plans] == [f"llama3-8b-{number}" for number in range(50)]
    assert models.model_name(cfg) == "llama3-8b-0"
    node_for = build.sim_node(cfg)
    assert node_for(plans[0].spec) is node_for(plans[49].spec)


def test_prefill_and_decode_of_a_copy_belong_together() -> None:
    """Groups of both roles share the copies' names, so each model has both; one role alone is an error."""
    entry = "{role: %s, model: llama3_8b, copies: %s, executors: 1}"
    groups = f"[{entry % ('prefill', 2)}, {entry % ('decode', '%d')}]"
    plans = build.groups(compose([f"fleet.groups={groups % 2}"]))
    assert {(plan.spec.model, plan.spec.role) for plan in plans} == {
        (f"llama3-8b-{number}", role) for number in range(2) for role in (Role.PREFILL, Role.DECODE)
    }
    with pytest.raises(ValueError, match="only prefill executors of llama3-8b-1"):
        build.groups(compose([f"fleet.groups={groups % 1}"]))


def test_rows_of_a_trace_choose_a_model(tmp_path: Path) -> None:
    """Rows that name a model get it, the others the run's; one that nobody serves fails and says so."""
    rows = [
        '{"arrival_s":0,"prompt_tokens":20,"output_tokens":4,"model":"qwen3-8b"}',
        '{"arrival_s":0,"prompt_tokens":20,"output_tokens":4}',
        '{"arrival_s":0,"prompt_tokens":20,"output_tokens":4,"model":"gpt-9"}',
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(rows) + "\n")
    fleet = "fleet.groups=[{role: colocated, executors: 1}, {role: colocated, executors: 1, model: qwen3_8b}]"
    result = run(compose(["trace=deepflow", f"trace.reader.path={file}", fleet, "coldstart=none", f"out={tmp_path}"]))
    requests = read_requests(tmp_path).sort_values("request_id")
    assert list(requests.model) == ["qwen3-8b", "llama3-8b", "gpt-9"]
    assert list(requests.outcome) == ["finished", "finished", "failed"]
    assert "no group of executors serves it" in requests.reason.iloc[2]
    assert list(requests.executor.iloc[:2]) == ["te-1", "te-0"]
    assert result.summary["failed"] == 1


def test_what_cannot_be_served() -> None:
    """Unknown models, two groups of one, one profile for several kinds of executors are errors that say what to do."""
    with pytest.raises(ValueError, match=r"fleet.groups\[0\].model is 'gpt_9': allowed are codellama_34b, "):
        build.groups(compose(["fleet.groups=[{role: colocated, executors: 1, model: gpt_9}]"]))
    two = "fleet.groups=[{role: colocated, executors: 1}, {role: colocated, executors: 1, model: qwen3_8b}]"
    with pytest.raises(ValueError, match="measured on one kind of executor, but the fleet has several: llama3-8b on 1"):
        build.sim_node(compose([two, "latency=profile", "latency.path=profile.json"]))
    with pytest.raises(ValueError, match=r"fleet.groups\[1\] is another group of colocated executors of llama3-8b"):
        build.groups(compose(["fleet.groups=[{role: colocated, executors: 1}, {role: colocated, executors: 2}]"]))


def test_workers_belong_to_no_model(tmp_path: Path) -> None:
    """Beside the groups of two models, workers tune the one that is asked for; a profile speaks for executors alone."""
    fleet = (
        "fleet.groups=[{role: training, executors: 1, npus: 8}, {role: cpu, executors: 1, slots: 3}, "
        "{role: colocated, executors: 1, copies: 2}]"
    )
    cfg = compose([fleet])
    assert list(models.served(cfg)) == ["llama3-8b-0", "llama3-8b-1"]
    entries = build.group_entries(cfg)
    assert [(spec.model, spec.npus, entry.slots) for spec, entry in entries.items()] == [
        ("training", 8, 1),
        ("cpu", 0, 3),
        ("llama3-8b-0", 1, 1),
        ("llama3-8b-1", 1, 1),
    ]
    train = Train("llama3-8b-1", 1, 2048, 32, 1.0)
    training, cpu = (build.sim_node(cfg)(spec) for spec in list(entries)[:2])
    assert training.time(next(iter(entries)), train) > 10**9
    assert cpu.slots == 3
    with pytest.raises(ValueError, match="a job trains 'gpt-9': allowed are the models that"):
        training.time(next(iter(entries)), Train("gpt-9", 1, 2048, 32, 1.0))
    profile = tmp_path / "profile.json"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    build.sim_node(compose([fleet, "latency=profile", f"latency.path={profile}"]))
    with pytest.raises(ValueError, match=r"fleet.groups\[0\].copies is 2: workers belong to no model, leave it out"):
        build.groups(compose(["fleet.groups=[{role: cpu, executors: 1, copies: 2}, {role: colocated, executors: 1}]"]))


def test_training_workers_sit_on_hosts() -> None:
    """Their NPUs are taken from those of executors; workers on CPUs take no place."""
    fleet = "fleet.groups=[{role: colocated, executors: 4}, {role: cpu, executors: 9}, %s]"
    training = "{role: training, executors: 1, npus: %d}"
    with pytest.raises(ValueError, match=r"backend.hosts is 1: training executor 1 of training, which takes 8 NPUs"):
        build.cluster(compose([fleet % (training % 8), "backend.hosts=1"]), None)
    build.cluster(compose([fleet % (training % 4), "backend.hosts=1"]), None).close()
    waits = build.sim_node(compose([fleet % (training % 8)]))
    hosts = [waits(plan.spec).host for plan in build.groups(compose([fleet % (training % 8)]))]
    assert hosts[0] == hosts[2] and hosts[1] is None


def test_agents_ask_for_one_of_several_models(tmp_path: Path) -> None:
    """Requests of the trace are mixed over the models, jobs ask for the run's own; costs are of all."""
    jobs = ("jobs=agents", "jobs.sources.0.sessions=2", "jobs.sources.0.max_context=20000", "jobs.sources.0.rate=5")
    cfg = compose([*THREE, *jobs, "jobs.sources.0.time_scale=0.01", "trace.duration_s=20", f"out={tmp_path}"])
    cfg.fleet.groups.append({"role": "cpu", "executors": 2})
    result = run(cfg)
    requests = read_requests(tmp_path)
    assert set(requests.outcome) == {"finished"}
    calls = requests.request_id >= FIRST_CALL
    assert set(requests.model[calls]) == {"llama3-8b"} and len(set(requests.model[~calls])) == 3
    assert {row.outcome for row in result.jobs.rows} == {"finished"}
    assert result.summary["npu_hours"] > 0 and result.summary["cost_usd"] > 0
    assert sum(each["npu_seconds"] for each in result.models.values()) == pytest.approx(result.summary["npu_seconds"])


def test_groups_have_profiles_of_their_own(tmp_path: Path) -> None:
    """Where step times are measured, each model has its own file of them."""
    for name, step_ns in (("a", 1e6), ("b", 3e6)):
        profile = msgspec.structs.replace(PROFILE, coefficients_ns=[step_ns, *PROFILE.coefficients_ns[1:]])
        (tmp_path / name).write_bytes(msgspec.json.encode(profile))
    groups = [
        f"{{role: colocated, executors: 1, model: {model}, profile: {tmp_path / name}}}"
        for model, name in (("llama3_8b", "a"), ("qwen3_8b", "b"))
    ]
    cfg = compose([f"fleet.groups=[{', '.join(groups)}]"])
    node_for = build.sim_node(cfg)
    times = [node_for(plan.spec).latency().decode_ns(1, 0, 1) for plan in build.groups(cfg)]
    assert times[1][0] - times[0][0] == 2_000_000
