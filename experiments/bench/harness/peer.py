"""transformers on the same weights: static batches by `generate`, and its own continuous batching."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from experiments.bench.harness.workload import Load

PAD = 0


class Peer:
    """A Llama of transformers with SDPA attention; `end of text` never ends an output."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", threads: int = 1) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil
        logs: Any = transformers.utils.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = PAD

    def generate(self, loads: Sequence[Load], batch: int) -> list[list[int]]:
        """Batches in order of arrival, padded on the left, each run to its longest output; surplus tokens dropped."""
        outputs: list[list[int]] = []
        for first in range(0, len(loads), batch):
            part = loads[first : first + batch]
            width = max(len(load.prompt) for load in part)
            tokens = torch.tensor([[PAD] * (width - len(load.prompt)) + load.prompt for load in part])
            mask = torch.tensor([[0] * (width - len(load.prompt)) + [1] * len(load.prompt) for load in part])
            with torch.inference_mode():
                out = self.model.generate(
                    tokens.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=max(load.output for load in part),
                    do_sample=False,
                )
            rows = out[:, width:].tolist()
            outputs += [row[: load.output] for row, load in zip(rows, part, strict=True)]
        return outputs

    def stream(self, load: Load) -> list[float]:
        """When each token of one request alone was there, in seconds of the process clock."""
        clock = _Clock()
        tokens = torch.tensor([load.prompt], device=self.device)
        with torch.inference_mode():
            self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=load.output,
                do_sample=False,
                streamer=clock,
            )
        return clock.times_s

    def continuous(self, loads: Sequence[Load], page: int, blocks: int, budget: int) -> tuple[float, list[list[int]]]:
        """(seconds, outputs) of all at once through `ContinuousBatchingManager`, its start-up not counted."""
        config = ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=budget)
        make: Any = transformers.GenerationConfig
        generation = make(do_sample=False, pad_token_id=PAD, eos_token_id=-1)
        with self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            manager.add_request([1, 2, 3], max_new_tokens=2)  # builds the cache and the batch processor
            manager.get_result(timeout=600)
            start = time.perf_counter()
            names = [manager.add_request(load.prompt, max_new_tokens=load.output) for load in loads]
            found: dict[str, list[int]] = {}
            while len(found) < len(loads):
                output = manager.get_result(timeout=600)
                if output is None or output.error:
                    raise RuntimeError(f"continuous batching gave no result: {output and output.error}")
                found[output.request_id] = list(output.generated_tokens)
            seconds = time.perf_counter() - start
        return seconds, [found[name] for name in names]


class _Clock(BaseStreamer):
    """Notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.times_s.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass
