"""Entry points: what a user runs. `experiments.run(compose([...]))` does from Python what `deepflow run` does."""

import experiments.compiled  # noqa: F401 - ahead of the modules that it may replace
from experiments.config import compose
from experiments.run import RunResult, resume, run

__all__ = ["RunResult", "compose", "resume", "run"]
