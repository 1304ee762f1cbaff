"""A soak: random requests, aborts, pauses, updates, sleeps and changes of the policy on one server, all at once.

Every answer is checked against the policies that may have given it: by transformers, token by token, with its
log-probabilities, text and counts. What is asked is drawn from a seed; which of it meets in time is not.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.error import URLError

import psutil
import torch
from scipy.stats import norm
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from transformers import AutoModelForCausalLM

from tests.byte_tokenizer import ASCII, make_byte_tokenizer
from tests.host.goodness import FALSE_ALARM, assert_exact, cells
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import EOS, VOCAB
from tests.host.servers import REQUEST_TIMEOUT_S, greedy, tokens
from tests.host.trainer_client import AREAL, SLIME, TrainerClient, buckets_of

TOKENIZER = make_byte_tokenizer()
CLIENTS = 10
PAUSE_S = 0.15  # of a client between its requests, on average
EVENT_S = 1.5  # between events, on average
LAST_WORDS_S = 10.0  # to end what one is at, once the soak has failed
LOGPROB_TOLERANCE = 2e-3
GREEDY_TOLERANCE = 1e-3  # of the logits of two tokens that are equally good
BANNED = [3, 5, 9, 23, 40, 61, 77, 88]  # SGLang's processor wants one list for all requests of a batch
STOP_LETTERS = sorted({*ASCII[:26]} - {*"<pad><eos>"})  # SGLang finds stop strings in the names of special tokens
GRAMMAR = "(ab|ba|今){2,9}"
GROWTH_BYTES = 192 * 2**20  # of all processes of a server, from the second to the last fifth of a soak
FINAL_PROMPTS = [[5, 6, 7], [12] * 20, [90, 8, 71, 15, 33]]
FINAL_SAMPLES, FINAL_TOKENS = 400, 4


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, and what its client does. leaves: chunks (streaming) or seconds after which the client hangs up.
    aborts: seconds after which it aborts the request."""

    prompt: list[int]
    sampling: Sampling
    params: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)
    stream: bool = False
    copies: int = 1
    leaves: float | None = None
    aborts: float | None = None

    @property
    def payload(self) -> dict:
        return {"input_ids": self.prompt, "sampling_params": self.params, **self.more}

    @property
    def penalised(self) -> bool:
        sampling = self.sampling
        return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0)

    @property
    def stop_tokens(self) -> set[int]:
        return set() if self.params["ignore_eos"] else {EOS, *self.params.get("stop_token_ids", ())}

    @property
    def stop_strings(self) -> list[str]:
        return self.params.get("stop", [])


def draw(rng: random.Random, rid: str, known: deque[list[int]]) -> Ask:
    """``known``: sequences of earlier answers, which some prompts continue (radix cache)."""

    def chance(probability: float) -> bool:
        return rng.random() < probability

    prompt = [rng.randrange(2, VOCAB - 1) for _ in range(rng.choice((1, 3, 10, 30, 60)))]
    share, which, length = chance(0.4), rng.random(), rng.randint(1, 60)  # drawn in any case: the rest is then the same
    if known and share:
        prompt = known[int(which * len(known))][:length] + prompt[:3]
    prompt[-1] = rng.randrange(2, 2 + len(ASCII))  # else the first character may begin in the prompt
    settings: dict = {"temperature": 0.0 if chance(0.4) else rng.choice((0.5, 0.8, 1.0, 1.3))}
    for name, values in (("top_k", (2, 5, 20)), ("top_p", (0.5, 0.9)), ("min_p", (0.02, 0.2))):
        if chance(0.2):
            settings[name] = rng.choice(values)
    if chance(0.15):
        settings["logit_bias"] = tuple(
            (token, rng.choice((-100.0, -2.0, 3.0))) for token in rng.sample(range(VOCAB), 5)
        )
    if chance(0.2):
        for name, values in (
            ("frequency_penalty", (0.05, 0.8)),
            ("presence_penalty", (0.5,)),
            ("repetition_penalty", (1.05, 1.4)),
        ):
            if chance(0.6):
                settings[name] = rng.choice(values)
    more: dict = {}
    if chance(0.05):
        settings["logit_bias"] = tuple((token, -1e9) for token in BANNED)
        more["custom_logit_processor"] = DisallowedTokensLogitsProcessor().to_str()
    sampling = Sampling(**settings)
    params = sampling.params(rng.choice((0, 1, 2, 5, 20, 40, 80, 200)))
    params["ignore_eos"] = chance(0.5)
    if "custom_logit_processor" in more:
        del params["logit_bias"]
        params["custom_params"] = {"token_ids": BANNED}
    if chance(0.06) and not sampling.logit_bias:
        params |= {"regex": GRAMMAR, "ignore_eos": False}
    else:
        if chance(0.2):
            params["stop_token_ids"] = rng.sample(range(2, VOCAB), 3)
        if chance(0.1):
            params["min_new_tokens"] = min(params["max_new_tokens"], rng.choice((5, 20)))
        if chance(0.15):
            params["stop"] = ["".join(rng.choices(STOP_LETTERS, k=rng.randint(1, 2))) for _ in range(2)]
    copies = rng.choice((2, 3)) if chance(0.08) else 1
    if copies > 1:
        params["n"] = copies
    if chance(0.4):
        more |= {"return_logprob": True, "top_logprobs_num": rng.choice((0, 0, 3))}
        if chance(0.3):
            more["logprob_start_len"] = 0
    if chance(0.01):
        more["return_hidden_states"] = True
    ask = {"prompt": prompt, "sampling": sampling, "params": params, "more": more, "copies": copies}
    stream = chance(0.5)
    if stream and chance(0.2):
        params["stream_interval"] = rng.choice((2, 7))
    fate = rng.random()
    if fate < 0.1:
        return Ask(**ask, stream=stream, leaves=rng.randint(1, 4) if stream else rng.uniform(0.05, 1.0))
    if fate < 0.2 and copies == 1:
        return Ask(**{**ask, "more": {**more, "rid": rid}}, stream=stream, aborts=rng.uniform(0.0, 1.0))
    return Ask(**ask, stream=stream)


class Wrong(AssertionError):
    """An answer that none of the policies can have given."""


class Policy:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.oracle = Oracle(path)
        self.weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        self.greedy = lru_cache(None)(lambda prompt, length: self.oracle.greedy(list(prompt), length))

    def logits(self, ask: Ask, output: list[int]) -> torch.Tensor:
        """Of each output token, penalised and biased, [T, V]."""
        sequence = torch.tensor([ask.prompt + output])
        raw_TV = self.oracle.logits(sequence)[0, len(ask.prompt) - 1 : -1].clone()
        raw_TV[: ask.params.get("min_new_tokens", 0), [EOS, *ask.params.get("stop_token_ids", ())]] = -torch.inf
        if not ask.penalised:
            return ask.sampling.penalised(raw_TV, torch.empty(len(output), 0, dtype=torch.int64))
        rows = [
            ask.sampling.penalised(raw_TV[t : t + 1], torch.tensor([output[:t]], dtype=torch.int64))
            for t in range(len(output))
        ]
        return torch.cat(rows)


def check_tokens(ask: Ask, answer: dict, policy: Policy) -> tuple[float, float]:
    """Raises Wrong if the policy does not give these tokens or log-probabilities. Returns how much more surprising the
    sampled tokens were than they should be on average, and the variance of that."""
    output, meta = answer["output_ids"], answer["meta_info"]
    if not output:
        return 0.0, 0.0
    logits_TV = policy.logits(ask, output)
    chosen_T = torch.tensor(output)
    temperature = ask.sampling.temperature
    if meta["finish_reason"] and meta.get("output_token_logprobs"):
        found_T = torch.tensor([entry[0] for entry in meta["output_token_logprobs"]], dtype=torch.float64)
        expected_T = (logits_TV / (temperature or 1.0)).log_softmax(-1)[range(len(output)), chosen_T][-len(found_T) :]
        far = (found_T - expected_T).abs() > LOGPROB_TOLERANCE
        if far.any():
            at = int(far.nonzero()[0])
            raise Wrong(f"log-probability {at} is {found_T[at]}, not {expected_T[at]}")
    if temperature == 0.0:
        worse_T = logits_TV.amax(1) - logits_TV[range(len(output)), chosen_T]
        if (worse_T > GREEDY_TOLERANCE).any():
            at = int((worse_T > GREEDY_TOLERANCE).nonzero()[0])
            raise Wrong(f"token {at} is {output[at]}; greedy is {int(logits_TV[at].argmax())}")
        return 0.0, 0.0
    p_TV = (logits_TV / temperature).softmax(1)
    outside = ~ask.sampling.kept(p_TV, slack=1e-4)[range(len(output)), chosen_T]
    if outside.any():
        at = int(outside.nonzero()[0])
        raise Wrong(f"token {at}, {output[at]}, is filtered out")
    p_TV = p_TV * ask.sampling.kept(p_TV)
    p_TV /= p_TV.sum(1, keepdim=True)
    surprise_TV = -p_TV.clamp_min(1e-12).log()
    entropy_T = (p_TV * surprise_TV).sum(1)
    variance_T = (p_TV * surprise_TV**2).sum(1) - entropy_T**2
    excess_T = surprise_TV[range(len(output)), chosen_T] - entropy_T
    return float(excess_T.sum()), float(variance_T.sum())


def waited(answer: dict) -> bool:
    """Aborted before it ran, or after it was retracted: SGLang then says nothing but that, or gives a token of nothing."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    return (
        bool(reason) and reason["type"] == "abort" and ("prompt_tokens" not in meta or bool(reason.get("status_code")))
    )


def check_counts(ask: Ask, answer: dict) -> None:
    """What holds of every chunk and answer, whatever policy gave it."""
    output, meta = answer["output_ids"], answer["meta_info"]
    finished = meta["finish_reason"] is not None
    if not finished:  # SGLang adds the next tokens to a chunk that it has not sent yet
        output = output[: meta["completion_tokens"]]
    limit = ask.params["max_new_tokens"]
    if finished and meta["finish_reason"]["type"] == "abort":
        limit = max(limit, 1)  # as in plain SGLang, the token that a request for none is given in any case
    expect(len(output) <= limit, "more tokens than asked for")
    expect(meta["completion_tokens"] == len(output), f"completion_tokens is {meta['completion_tokens']}")
    expect(meta["reasoning_tokens"] <= len(output), f"reasoning_tokens is {meta['reasoning_tokens']}")
    expect(meta["prompt_tokens"] == len(ask.prompt) > meta["cached_tokens"] >= 0, "prompt or cached tokens")
    if finished and meta.get("spec_verify_ct"):
        accepted, drafted = meta["spec_num_correct_drafts"], meta["spec_num_proposed_drafts"]
        emitted = 1 + meta["num_retractions"] + meta["spec_verify_ct"] + accepted  # by prefills, steps and drafts
        expect(
            accepted <= drafted and emitted >= len(output), f"{accepted} of {drafted} drafts, {emitted} tokens emitted"
        )
    if finished and ask.more.get("return_logprob"):
        scored = output[: ask.params["max_new_tokens"]]
        # A stream that is retracted in its first step loses its first token's, as in plain SGLang: an empty chunk counts as one.
        scored = scored[
            ask.stream and meta["num_retractions"] > 0 and len(meta["output_token_logprobs"]) < len(scored) :
        ]
        expect([entry[1] for entry in meta["output_token_logprobs"]] == scored, "log-probabilities of other tokens")
        if ask.more["top_logprobs_num"] and scored:  # a request for no tokens is given those of one, as in plain SGLang
            tops = meta["output_top_logprobs"]
            expect([len(top) for top in tops] == [3] * len(scored), f"alternatives of {len(tops)} tokens")


def check_end(ask: Ask, answer: dict) -> None:
    """Where an answer ends, and its text."""
    output, reason = answer["output_ids"], answer["meta_info"]["finish_reason"]
    text = TOKENIZER.decode(output, skip_special_tokens=True)
    kind, matched = reason["type"], reason.get("matched")
    inner = output[:-1]  # the last one may be a stop: then a limit or an abort has come first
    expect(not set(inner) & ask.stop_tokens or "regex" in ask.params, "it goes on after a stop token")
    if kind == "length":
        expect(len(output) == ask.params["max_new_tokens"], "it ended too early")
    if isinstance(matched, int):
        expect(output[-1] == matched and matched in ask.stop_tokens, "it ended at no stop token")
        text = TOKENIZER.decode(inner, skip_special_tokens=True)
    found = [text.index(stop) for stop in ask.stop_strings if stop in text]
    if isinstance(matched, str):
        expect(matched in text, "it ended at no stop string")
        text = text[: min(found)]
    else:
        within = TOKENIZER.decode(inner, skip_special_tokens=True)
        expect(not any(stop in within for stop in ask.stop_strings), "it goes on after a stop string")
    expect(answer["text"] == text, f"the text is {answer['text']!r}, not {text!r}")
    if "regex" in ask.params and kind == "stop":
        expect(re.fullmatch(GRAMMAR, answer["text"]), "the grammar is not obeyed")


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


@contextmanager
def about(ask: Ask, answer: dict) -> Iterator[None]:
    """Whatever is wrong is wrong with this."""
    try:
        yield
    except Wrong as wrong:
        raise Wrong(f"{wrong}\n{ask}\n{answer}") from None


class Soak:
    """``ranks``: tensor-parallel ranks of the server, which serves the first of ``policies``. ``timeout_s``: after which a
    request is lost."""

    def __init__(
        self,
        server,
        policies: list[Path],
        seed: int,
        *,
        ranks: int = 1,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.server, self.seed, self.ranks = server, seed, ranks
        self.timeout_s = timeout_s
        self.trainer = TrainerClient(server)
        self.policies = [Policy(path) for path in policies]
        self.versions = [0]  # policies served, in order; those of the last ones may not have arrived yet
        self.arrived = 0  # index of the last that has
        self.seen: Counter[str] = Counter()
        self.surprise = [0.0, 0.0]  # its excess over all sampled tokens, and the variance of that
        self.events: deque[str] = deque(maxlen=40)
        self.known: deque[list[int]] = deque(maxlen=50)
        self.memory: list[int] = []
        self.failure: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._idle = self.load()

    # -- the soak ----------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Raises AssertionError with the seed and the last events."""
        parts = [*((f"client-{i}", self._ask) for i in range(CLIENTS)), ("operator", self._disturb)]
        people = [threading.Thread(target=self._live, args=part, daemon=True) for part in parts]
        deadline_s = time.monotonic() + seconds
        for person in people:
            person.start()
        while time.monotonic() < deadline_s and not self._over.wait(1.0):
            self.memory.append(self._memory_bytes())
        self._over.set()
        with self._reporting():
            end_s = time.monotonic() + (LAST_WORDS_S if self.failure else 2 * self.timeout_s)
            for person in people:
                person.join(max(0.0, end_s - time.monotonic()))
            if self.failure:
                raise self.failure
            expect(not any(person.is_alive() for person in people), "a request was neither answered nor refused")
            self._check_server()

    def _live(self, name: str, act: Callable[[random.Random, str], None]) -> None:
        rng = random.Random(f"{self.seed}-{name}")
        turn = 0
        while not self._over.is_set():
            turn += 1
            try:
                act(rng, f"{name}-{turn}")
            except BaseException as error:
                self._note(f"{name}-{turn} FAILED: {error!r}")
                self.failure = self.failure or error
                self._over.set()

    def _note(self, event: str) -> None:
        self.events.append(f"{time.monotonic() - self._started_s:8.2f} s  {event}")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            events = "\n".join(self.events)
            raise AssertionError(
                f"{error}\nseed {self.seed}, after {dict(self.seen)}; the last events:\n{events}\n"
                f"end of {self.server.log_path}:\n{self.server.log_tail()}"
            ) from error

    # -- clients -----------------------------------------------------------------------------------------------

    def _ask(self, rng: random.Random, rid: str) -> None:
        self._over.wait(rng.expovariate(1 / PAUSE_S))
        if rng.random() < 0.07:
            return self._complete(rng)
        ask = draw(rng, rid, self.known)
        first = self.arrived
        self._note(f"{rid} asks {ask}")
        if ask.aborts is not None:
            threading.Timer(ask.aborts, self.server.post, ("/abort_request", {"rid": rid})).start()
        try:
            answers = self._streamed(ask) if ask.stream else self._whole(ask)
        except RuntimeError as error:  # HTTP 400
            self._was_aborted(error)
            return
        policies = [self.policies[i] for i in {*self.versions[first:]}]
        for answer in answers:
            with about(ask, answer):
                self._check(ask, answer, policies)
        self._note(f"{rid} is answered")

    def _whole(self, ask: Ask) -> list[dict]:
        timeout_s = self.timeout_s if ask.leaves is None else ask.leaves
        try:
            answers = self.server._request("/generate", ask.payload, timeout_s)
        except (TimeoutError, URLError) as error:  # before it was sent, urllib wraps it
            if ask.leaves is None or not isinstance(getattr(error, "reason", error), TimeoutError):
                raise
            self.seen["left"] += 1
            return []
        answers = answers if isinstance(answers, list) else [answers]
        expect(len(answers) == ask.copies, f"{len(answers)} answers for {ask.copies}")
        return answers

    def _streamed(self, ask: Ask) -> list[dict]:
        last: dict[int, dict] = {}
        for count, chunk in enumerate(self.server.stream(ask.payload, timeout_s=self.timeout_s), start=1):
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            if waited(chunk):
                last[chunk.get("index", 0)] = chunk
                continue
            before = last.get(chunk.get("index", 0), {"output_ids": [], "text": ""})
            with about(ask, chunk):
                expect(
                    chunk["output_ids"][: len(before["output_ids"])] == before["output_ids"], "other tokens than before"
                )
                expect(chunk["text"].startswith(before["text"]), f"the text was {before['text']!r}")
                check_counts(ask, chunk)
            last[chunk.get("index", 0)] = chunk
            if count == ask.leaves:
                self.seen["left"] += 1
                return list(last.values())
        expect(len(last) == ask.copies, f"{len(last)} answers for {ask.copies}")
        expect(all(chunk["meta_info"]["finish_reason"] for chunk in last.values()), "a stream broke off")
        return list(last.values())

    def _was_aborted(self, error: RuntimeError) -> None:
        """SGLang answers some aborts with an error: of requests in the queue, or in the middle of their prefill."""
        if "Abort" not in str(error):
            raise error
        self.seen["aborted in the queue"] += 1

    def _check(self, ask: Ask, answer: dict, policies: list[Policy]) -> None:
        if waited(answer):
            self.seen["aborted in the queue"] += 1
            return
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        check_counts(ask, answer)
        if reason is not None:  # else the client has left
            check_end(ask, answer)
            self.seen["aborted" if reason["type"] == "abort" else "answered"] += 1
            expect(reason["type"] in ("stop", "length", "abort"), f"finished by {reason}")
        self.seen["retracted"] += meta["num_retractions"] > 0
        if "regex" in ask.params:
            return
        with self._lock:  # one at a time: the server needs the cores
            found, wrongs = [], []
            for policy in policies:
                try:
                    found.append(check_tokens(ask, answer, policy))
                except Wrong as wrong:
                    wrongs.append(str(wrong))
            expect(found, " and ".join(wrongs))
            if len(policies) == 1:
                self.surprise[0] += found[0][0]
                self.surprise[1] += found[0][1]
                self.seen["tokens"] += len(answer["output_ids"])
        self.known.append(ask.prompt + answer["output_ids"])

    def _complete(self, rng: random.Random) -> None:
        """A greedy request by OpenAI's endpoint."""
        prompt, length = tuple(rng.sample(range(2, 2 + len(ASCII)), rng.randint(1, 5))), rng.choice((1, 9, 30))
        body = {"model": "policy", "prompt": list(prompt), "max_tokens": length, "temperature": 0, "ignore_eos": True}
        first = self.arrived
        if rng.random() < 0.5:
            answers = list(self.server.stream(body, "/v1/completions", self.timeout_s))
            if "error" in answers[-1]:
                return self._was_aborted(RuntimeError(answers[-1]["error"]))
            chunks = [choice for answer in answers for choice in answer["choices"]]
            text, reason = "".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]
        else:
            try:
                answer = self.server._request("/v1/completions", body, self.timeout_s)
            except RuntimeError as error:
                return self._was_aborted(error)
            text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        with self._lock:
            wholes = [
                TOKENIZER.decode(self.policies[i].greedy(prompt, length), skip_special_tokens=True)
                for i in {*self.versions[first:]}
            ]
        if reason == "abort":
            fits = any(whole.startswith(text.rstrip("\ufffd")) for whole in wholes)
        else:
            fits = text in wholes
        expect(fits, f"the completion {text!r} ({reason}) is of none of {wholes}")
        self.seen["completions"] += 1

    # -- the operator ------------------------------------------------------------------------------------------

    def _disturb(self, rng: random.Random, _: str) -> None:
        self._over.wait(rng.expovariate(1 / EVENT_S))
        events = [
            self._pause, self._update, self._update, self._repeat, self._fail, self._sleep, self._flush,
            self._change, self._change, self._abort_all,
        ]  # fmt: skip
        event = rng.choice(events) if self.seen["_update"] else self._update
        self._note(f"{event.__name__} ...")
        what = event(rng)
        self._note(f"{event.__name__} {what or ''} done")
        self.seen[event.__name__] += 1

    def _pause(self, rng) -> str:
        mode = rng.choice(("abort", "in_place", "retract"))
        self.trainer.pause(mode)
        self._over.wait(rng.uniform(0.0, 0.5))
        self.trainer.resume()
        return mode

    def _send(self, rng, policy: Policy, *, reported: bool = False) -> str:
        """Bring the weights of ``policy`` by any of the ways, or by one that SGLang is told of."""
        ways = ["disk", "ipc", *(["tensors", "flattened"] if self.ranks == 1 else [])]
        way = rng.choice(ways if reported else [*ways, "directly"])
        if way == "disk":
            self.trainer.send_disk(policy.path, **SLIME)
        elif way == "ipc":
            self.trainer.send_ipc(*[policy.path] * self.ranks, **SLIME)
        elif way == "directly":
            self.trainer.write_directly(policy.path)
        else:
            self.trainer.send_tensors(buckets_of(policy.weights), flattened=way == "flattened", **SLIME)
        return way

    def _update(self, rng) -> str:
        """To the other policy: nothing runs meanwhile."""
        new = 1 - self.versions[-1]
        if rng.random() < 0.3:  # as AReaL does it
            self.versions.append(new)
            self.trainer.pause()
            self.trainer.send_disk(self.policies[new].path, **AREAL)
            self.trainer.resume()
            way = "areal"
        else:
            with self.trainer.paused():
                self.versions.append(new)
                way = self._send(rng, self.policies[new])
        self.arrived = len(self.versions) - 1
        return f"to {new} by {way}"

    def _repeat(self, rng, *, reported: bool = False) -> str:
        """The same weights again, while requests wait in the middle of their answers."""
        mode = rng.choice(("in_place", "retract"))
        self.trainer.pause(mode)
        way = self._send(rng, self.policies[self.versions[-1]], reported=reported)
        self.trainer.resume()
        return f"{mode} by {way}"

    def _fail(self, rng) -> None:
        """An update that fails; the server decodes plainly until it hears of one that succeeds."""
        with self.trainer.paused():
            try:
                self.trainer.send_disk(Path("/no/such/policy"))
            except RuntimeError:
                pass
            else:
                raise Wrong("an update from nowhere succeeded")
        self._over.wait(0.3)
        self._repeat(rng, reported=True)

    def _sleep(self, rng) -> None:
        with self.trainer.paused():
            self.trainer.release()
            self._over.wait(0.1)
            self.trainer.reclaim()
            self.trainer.write_directly(self.policies[self.versions[-1]].path)  # else from a backup, not on a CPU

    def _flush(self, rng) -> str:
        try:
            self.server.flush_cache()
        except RuntimeError:  # requests are running
            return "refused"

    def _change(self, rng) -> str:
        settings = rng.choice(
            [
                {"mode": "off"},
                {"mode": "always", "fixed_gamma": 3},
                {"mode": "always", "fixed_gamma": 1},
                {"mode": "threshold", "fixed_gamma": 2, "threshold_batch": 4},
                {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]},
                {"mode": "cycle", "cycle": [3, 1]},
            ]
        )
        self.server.change_self_quant(settings)
        return str(settings)

    def _abort_all(self, rng) -> None:
        self.server.post("/abort_request", {"abort_all": True})

    # -- the end -----------------------------------------------------------------------------------------------

    def load(self) -> list[dict]:
        """Requests and KV tokens in use, of each replica, once the server is idle."""
        self.server.empty()
        loads = self.server._request("/v1/loads")["loads"]
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        return [{name: load[name] for name in names} for load in loads]

    def _memory_bytes(self) -> int:
        server = psutil.Process(self.server.process.pid)
        return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)])

    def _check_server(self) -> None:
        server, policy = self.server, self.policies[self.versions[-1]]
        server.change_self_quant({"mode": "cycle", "cycle": [3, 0, 1, 2, 3]})
        expect(self.load() == self._idle, f"idle, it holds {self.load()}; at the start {self._idle}")
        before = server.self_quant()
        fifth = len(self.memory) // 5
        early, late = (sorted(part)[fifth // 2] for part in (self.memory[fifth : 2 * fifth], self.memory[-fifth:]))
        self.seen["grown MiB"] = (late - early) // 2**20
        expect(late - early < GROWTH_BYTES, f"its processes grew by {(late - early) / 2**20:.0f} MiB")
        ask = {"input_ids": FINAL_PROMPTS, "sampling_params": greedy(40)}
        expected = [policy.greedy(tuple(prompt), 40) for prompt in FINAL_PROMPTS]
        expect(tokens(server.generate(ask)) == expected, "greedy answers after the soak")
        streamed = {chunk["index"]: chunk["output_ids"] for chunk in server.stream(ask)}
        expect([streamed[i] for i in range(len(FINAL_PROMPTS))] == expected, "streamed answers after the soak")
        prompt, sampling = FINAL_PROMPTS[0], Sampling(temperature=1.1)
        params = sampling.params(FINAL_TOKENS)
        sampled = server.generate({"input_ids": [prompt] * FINAL_SAMPLES, "sampling_params": params})
        assert_exact(cells(policy.oracle, prompt, tokens(sampled), sampling))
        after = server.self_quant()
        expect(
            after["accepted_tokens"] > before["accepted_tokens"] and not after["dirty"], "nothing is drafted at the end"
        )
        excess, variance = self.surprise
        deviations = excess / math.sqrt(variance)
        expect(2 * norm.sf(abs(deviations)) > FALSE_ALARM, f"all sampled tokens are {deviations:.1f} deviations off")
        expect(server.process.poll() is None, "the server ended")
