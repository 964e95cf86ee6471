"""Entry points: what a user runs. `experiments.run(compose([...]))` does from Python what `deepflow run` does."""

from experiments.config import compose
from experiments.run import RunResult, resume, run

__all__ = ["RunResult", "compose", "resume", "run"]
