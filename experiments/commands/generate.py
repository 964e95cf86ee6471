"""`deepflow generate`: one engine on this machine, a prompt, and its answer as it comes."""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
from omegaconf import DictConfig

from cluster import events as ev
from cluster.actions import EndRun
from cluster.control import ControlPlane
from cluster.job_executor import JobExecutor
from cluster.manager import ClusterManager
from cluster.recorder import Recorder
from experiments import build
from experiments.commands.usage import Parser, compose_from
from flowserve.runtime.sampling import Sampling
from flowserve.runtime.tokenizer import ChatMessage
from policies.dispatch.least_outstanding import LeastOutstanding
from policies.scaling.fixed import Fixed
from real.text import ServedModel, TextClient, TextPiece
from real.tokenizer_pool import TokenizerPool

ABOUT = """Starts one engine on this machine and prints the answer to a prompt as it comes; then, on stderr, how fast
that was. MODEL_DIR is a Hugging Face folder (config.json, safetensors, tokenizer.json); without one, a tiny model with
random weights shows the way. KEY=VALUE sets the engine and the sampling as in `deepflow run`, for example
sampling=chat sampling.temperature=0.5 seed=7 backend.dtype=bfloat16 engine.kv_blocks=4096."""
BASE = [
    "backend=real",
    "model=tiny_llama",
    "engine=small",
    "hardware=cpu",
    "fleet.groups=[{role: colocated, executors: 1}]",
]


def main(arguments: list[str]) -> int:
    parser = Parser(prog="deepflow generate", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", nargs="?", metavar="MODEL_DIR")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--prompt", required=True, help="text to go on with")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, for the chat template")
    parser.add_argument("--max-tokens", type=int, default=128, help="limit of the answer (default %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the model's end of sequence")
    args = parser.parse_intermixed_args(arguments)
    if args.model_dir is not None and "=" in args.model_dir:
        args.model_dir, args.settings = None, [args.model_dir, *args.settings]
    cfg = compose_from(args.settings, BASE)
    cfg.model.folder = args.model_dir
    build.check_types(cfg)
    sampling = msgspec.structs.replace(build.sampling(cfg), stop=tuple(args.stop), ignore_eos=args.ignore_eos)
    prompt = [ChatMessage("user", args.prompt)] if args.chat else args.prompt
    return _generate(cfg, prompt, sampling, args.max_tokens)


def _generate(cfg: DictConfig, prompt: str | list[ChatMessage], sampling: Sampling, max_tokens: int) -> int:
    started = time.monotonic()
    shape, folder = build.model_shape(cfg), build.model_folder(cfg)
    if cfg.model.folder is None:
        from flowserve.runtime.tiny_tokenizer import make_tokenizer

        make_tokenizer(Path(folder), shape.vocab)
        print("no MODEL_DIR: a tiny model with random weights speaks", file=sys.stderr)
    pieces: list[tuple[float, TextPiece]] = []

    def show(piece: TextPiece) -> None:
        print(piece.text, end="", flush=True)
        pieces.append((time.monotonic(), piece))

    with ExitStack() as stack:
        pool = stack.enter_context(closing(TokenizerPool(folder)))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepflow-")))
        cluster = stack.enter_context(build.real_cluster(cfg, ["client", "je-0", "cm"], logs))
        client = TextClient(cluster, pool, ServedModel.from_folder(build.model_name(cfg), folder), show)
        manager = ClusterManager(build.groups(cfg), Fixed(), ("je-0",))
        control = ControlPlane(client, [JobExecutor("je-0", 0, LeastOutstanding())], manager, Recorder())
        sent = started
        while (event := cluster.next_event()) is not None:
            actions = control.on_event(event)
            match event:
                case ev.ExecutorFailed():
                    raise ValueError(f"the engine failed: {event.reason}")
                case ev.FleetReady():
                    sent = time.monotonic()
                    client.submit(prompt, sampling, max_tokens)
            for action in actions:
                cluster.submit(action)
            if pieces and pieces[-1][1].finish is not None:
                cluster.submit(EndRun())
    return _report(pieces, sent, sent - started)


def _report(pieces: list[tuple[float, TextPiece]], sent: float, ready_s: float) -> int:
    """How it went, on stderr. ValueError: it went wrong."""
    (first, _), (end, last) = pieces[0], pieces[-1]
    if last.tokens:
        print(flush=True)
    if last.finish == "error":
        raise ValueError(last.reason)
    rate = f", then {(last.tokens - 1) / (end - first):.1f} tokens/s" if last.tokens > 1 and end > first else ""
    took = f"the first after {first - sent:.3f} s{rate}; engine ready in {ready_s:.1f} s"
    print(f"{last.tokens} tokens ({last.finish}), {took}", file=sys.stderr)
    return 0
