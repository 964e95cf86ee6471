"""Open-loop workloads drawn from distributions that were fitted to public traces.

Lengths are mixtures of lognormals LN(mu, sigma), in tokens, clipped at the longest that the trace has (a hard cap of
the service, so mass at the cap is real). Prompt and output are drawn independently: their rank correlation is below
0.1 in all these traces. Arrivals are a renewal process with Gamma gaps, whose CV is 1 / sqrt(shape). The shapes are
medians over 5-min windows. Beside each mixture: its Kolmogorov-Smirnov distance to the trace, as fitted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.request import Answer, Arrival, Request
from cluster.streams import stream
from cluster.vocabulary import NS_PER_S, to_ns
from traces.errors import TraceError, require

_CHUNK = 1024


class LogNormal(NamedTuple):
    """A component of a mixture: its share, and mean and deviation of the natural logarithm."""

    weight: float
    mu: float
    sigma: float


class Mixture(NamedTuple):
    """A length in tokens: lognormal components, clipped to 1 … `most`."""

    most: int
    parts: tuple[LogNormal, ...]

    def draw(self, rng: np.random.Generator, size: int) -> list[int]:
        """`size` lengths."""
        shares = np.cumsum([part.weight for part in self.parts])
        choice = np.searchsorted(shares / shares[-1], rng.random(size), side="right")
        mu = np.array([part.mu for part in self.parts])[choice]
        sigma = np.array([part.sigma for part in self.parts])[choice]
        lengths = np.exp(mu + sigma * rng.standard_normal(size))
        clipped: list[int] = np.clip(np.rint(lengths), 1, self.most).astype(np.int64).tolist()
        return clipped


class Profile(NamedTuple):
    """What a trace is like: its lengths, and the shape of its gaps (1: Poisson)."""

    prompt: Mixture
    output: Mixture
    gamma_shape: float


PROFILES: dict[str, Profile] = {
    "azure2023_code": Profile(
        Mixture(7437, (LogNormal(0.31, 5.55, 1.32), LogNormal(0.69, 7.65, 0.72))),  # KS .03
        Mixture(1899, (LogNormal(0.66, 2.36, 0.38), LogNormal(0.34, 3.60, 0.90))),  # KS .03
        gamma_shape=0.25,  # whole windows; the trace itself is on/off, 0.35 inside a burst
    ),
    "azure2023_conv": Profile(
        # KS .11: the trace has spikes at single lengths
        Mixture(14050, (LogNormal(0.63, 6.27, 1.00), LogNormal(0.29, 6.98, 0.06), LogNormal(0.08, 8.32, 0.02))),
        Mixture(1000, (LogNormal(0.72, 4.64, 0.71), LogNormal(0.28, 6.01, 0.05))),  # KS .05
        gamma_shape=0.89,
    ),
    "mooncake_conversation": Profile(
        # KS .03
        Mixture(126_195, (LogNormal(0.09, 6.81, 0.02), LogNormal(0.11, 7.20, 0.23), LogNormal(0.80, 9.17, 0.92))),
        Mixture(2000, (LogNormal(0.34, 4.03, 1.62), LogNormal(0.66, 6.01, 0.35))),  # KS .02
        gamma_shape=1.0,  # stamps of 3 s hide it; counts per stamp are Poisson (index of dispersion 1.1)
    ),
    "mooncake_arxiv": Profile(
        Mixture(125_546, (LogNormal(0.65, 8.60, 1.05), LogNormal(0.35, 8.80, 0.06))),  # KS .05
        Mixture(2000, (LogNormal(0.63, 2.52, 1.29), LogNormal(0.37, 6.00, 0.40))),  # KS .12
        gamma_shape=1.0,  # as above, index of dispersion 1.6
    ),
    "sharegpt8k": Profile(
        # KS .02
        Mixture(8141, (LogNormal(0.20, 4.36, 1.24), LogNormal(0.53, 7.30, 0.71), LogNormal(0.26, 8.46, 0.30))),
        # KS .02
        Mixture(1024, (LogNormal(0.26, 4.58, 1.18), LogNormal(0.57, 6.04, 0.40), LogNormal(0.18, 6.67, 0.16))),
        gamma_shape=1.0,  # the set has lengths only; Poisson is assumed
    ),
}
"""Profiles by name. The traces: Azure LLM inference 2023 (CC-BY-4.0), Mooncake FAST'25 and its older arXiv trace
(Apache-2.0), ShareGPT lengths under the Llama-2 tokenizer as published with Sarathi-Serve (Apache-2.0)."""


@dataclass(frozen=True, slots=True)
class SyntheticTrace:
    """A workload like `profile`, at `rate` requests/s for `duration_s`; the same arguments give the same workload.

    `gamma_shape` overrides the profile's (lower is burstier). Arrivals, prompts and outputs draw from one named stream
    each, so changing one leaves the others. ValueError: an unknown profile, or a number out of range; `TraceError`
    while iterating: no arrival fell into the duration.
    """

    profile: str
    rate: float
    duration_s: float
    model: str
    seed: int = 0
    max_tokens: int = 2048
    gamma_shape: float | None = None

    def __post_init__(self) -> None:
        known = ", ".join(PROFILES)
        require(self.profile in PROFILES, "profile", self.profile, f"one of {known}", "choose one of them")
        require(0 < self.rate < np.inf, "rate", self.rate, "more than 0 requests/s", "raise it")
        seconds = self.duration_s
        require(0 < seconds < np.inf and to_ns(seconds) > 0, "duration_s", seconds, "more than 0 s", "lengthen it")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1 token", "choose a client's limit")
        ok = self.gamma_shape is None or 0 < self.gamma_shape < np.inf
        require(ok, "gamma_shape", self.gamma_shape, "a number above 0", "1 is Poisson, lower is burstier")
        stream(self.seed, "")

    def __iter__(self) -> Iterator[Arrival]:
        profile = PROFILES[self.profile]
        prompts = _lengths(profile.prompt, stream(self.seed, "prompt lengths"))
        outputs = _lengths(profile.output, stream(self.seed, "output lengths"))
        request_id = None
        for request_id, at_ns in enumerate(self._times()):
            output = next(outputs)
            request = Request(request_id, next(prompts), max(self.max_tokens, output), self.model)
            yield Arrival(request, Answer(output), at_ns)
        if request_id is None:
            raise TraceError(
                f"no request arrives in {self.duration_s} s at {self.rate} requests/s: allowed is at least one; "
                "raise the rate or the duration"
            )

    def _times(self) -> Iterator[int]:
        """Arrival times below the duration."""
        profile = PROFILES[self.profile]
        shape = profile.gamma_shape if self.gamma_shape is None else self.gamma_shape
        rng, end, at_ns = stream(self.seed, "arrivals"), to_ns(self.duration_s), 0
        while True:
            for gap in rng.gamma(shape, NS_PER_S / (shape * self.rate), _CHUNK).tolist():
                at_ns += round(gap)
                if at_ns >= end:
                    return
                yield at_ns


def _lengths(mixture: Mixture, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from mixture.draw(rng, _CHUNK)
