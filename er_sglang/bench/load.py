"""What is sent to a server, and what came back, when.

Every arm of a comparison gets the same `Request`s: the same prompts, and with `ignore_eos` the same
number of tokens each. Responses are streamed, so that each request's output over time, and with it the
running batch, is known without asking the server. `client.run_load` does the sending.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

STREAM_INTERVAL_TOKENS = 8
# What a request asks for besides its temperature, by name.
OPTIONS = {
    "default": {},
    "logprob": {"return_logprob": True},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
    "penalties": {"frequency_penalty": 0.05, "repetition_penalty": 1.05},
    "all": {"return_logprob": True, "top_p": 0.95, "top_k": 50, "min_p": 0.05, "frequency_penalty": 0.05},
}
WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request. `prompt` is text or token ids; `ignore_eos` makes it exactly `max_new_tokens` long; `options` are
    those of OPTIONS."""

    prompt: str | tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = False
    temperature: float = 1.0
    options: str = "default"
    stream_interval: int = 1
    """Tokens between streamed chunks; raise it where the server's HTTP side would become the bottleneck."""

    @property
    def sampling_params(self) -> dict:
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "ignore_eos": self.ignore_eos,
            "stream_interval": self.stream_interval,
            **{name: value for name, value in OPTIONS[self.options].items() if name != "return_logprob"},
        }


def payload(requests: Sequence[Request]) -> dict:
    """The body of one /generate call that streams all of `requests`; their prompts are all text, or all token ids."""
    return {
        "text" if isinstance(requests[0].prompt, str) else "input_ids": [request.prompt for request in requests],
        "sampling_params": [request.sampling_params for request in requests],
        "return_logprob": ["return_logprob" in OPTIONS[request.options] for request in requests],
        "stream": True,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What came back for one request. Times are seconds since the load began."""

    start_s: float
    end_s: float
    times_s: tuple[float, ...]
    """Arrival of each chunk, and with it..."""
    tokens: tuple[int, ...]
    """...the tokens received so far."""
    text: str
    meta_info: dict

    @property
    def total_tokens(self) -> int:
        return self.tokens[-1]

    def tokens_at(self, time_s: float) -> float:
        """Tokens received by `time_s`, interpolated between chunks."""
        return interpolate(time_s, (self.start_s, *self.times_s), (0, *self.tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadResult:
    """Completions in the order of the requests."""

    began_unix_s: float
    """Unix time at which the load began."""
    completions: tuple[Completion, ...]

    @property
    def wall_s(self) -> float:
        return max(c.end_s for c in self.completions)

    @property
    def total_tokens(self) -> int:
        return sum(c.total_tokens for c in self.completions)

    @property
    def tokens_per_s(self) -> float:
        return self.total_tokens / self.wall_s

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and target step, the prompt's first token excluded; 1.0 without speculation.

        From the requests' own `spec_verify_ct`, which counts gamma = 0 steps too.
        """
        speculative = [c for c in self.completions if "spec_verify_ct" in c.meta_info]
        if not speculative:
            return 1.0
        steps = sum(c.meta_info["spec_verify_ct"] for c in speculative)
        return sum(c.total_tokens - 1 for c in speculative) / steps

    def tokens_at(self, time_s: float) -> float:
        """Tokens received from all requests by `time_s`."""
        return sum(c.tokens_at(time_s) for c in self.completions)

    def running_at(self, time_s: float) -> int:
        """Requests that are decoding at `time_s`: first token received, last one not."""
        return sum(c.times_s[0] <= time_s < c.end_s for c in self.completions)

    def steady_window_s(self) -> tuple[float, float]:
        """From the moment the last request has its first token to the moment the first one ends.

        All requests decode throughout: no prefill, and the running batch is constant. Raises ValueError
        if there is no such moment (requests queued, or too short).
        """
        begin_s = max(c.times_s[0] for c in self.completions)
        end_s = min(c.end_s for c in self.completions)
        if end_s <= begin_s:
            raise ValueError(
                "no steady window: the first request ended before the last one started to decode; "
                "ask for more output tokens, or for less concurrency than the KV cache holds"
            )
        return begin_s, end_s

    def steady_tokens_per_s(self) -> float:
        """Decode rate of the full batch, free of prefill and tail."""
        begin_s, end_s = self.steady_window_s()
        return (self.tokens_at(end_s) - self.tokens_at(begin_s)) / (end_s - begin_s)


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear y(x) through ascending `xs`, constant beyond both ends."""
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:]):
        if x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def random_prompts(n: int, *, seed: int, tokens: int, vocab: int) -> list[tuple[int, ...]]:
    """`n` prompts of `tokens` random ids each. Ids below 100 are left out: special tokens live there or at the end."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(min(100, vocab // 2), vocab) for _ in range(tokens)) for _ in range(n)]
