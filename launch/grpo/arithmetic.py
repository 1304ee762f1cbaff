"""A task for chat models: sums to be worked out line by line, as many as the problem has links.

    prompt    Start with 57. Then: +8, -3, +4.
    response  57 + 8 = 65
              65 - 3 = 62
              62 + 4 = 66
              Answer: 66

The number of links is log-normal, so response lengths have a tail, and a policy that loses its place makes it longer.
Examples in the prompt show the form.
"""

import random
import re

MEDIAN_LINKS, SIGMA, MOST_LINKS = 16, 0.9, 90
LARGEST_TOTAL, LARGEST_TERM = 99, 9

Prompt = list[dict[str, str]]
"""Chat messages, the last one the problem."""


def prompts(n: int, rng: random.Random) -> list[Prompt]:
    return [[*EXAMPLES, {"role": "user", "content": _problem(_links(rng), rng)}] for _ in range(n)]


def reward(prompt: Prompt, response: str, ended: bool) -> float:
    """Mean over the lines, until one has not its form: 1 for a right one, half for one with a wrong sum, from which the
    next line may go on. Lines too few or too many count as 0; whether the response ended does not matter."""
    total, *terms = _numbers(prompt[-1]["content"])
    lines = response.strip().splitlines()
    points = 0.0
    for term, line in zip(terms, lines):
        left, _, right = line.partition(" = ")
        if left != _sum(total, term) or not re.fullmatch(r"-?\d{1,4}", right):
            break
        points += 1.0 if int(right) == total + term else 0.5
        total = int(right)
    else:
        points += lines[len(terms) : len(terms) + 1] == [_answer(total)]
    return points / max(len(terms) + 1, len(lines))


def solution(problem: str) -> str:
    """The right response."""
    total, *terms = _numbers(problem)
    lines = []
    for term in terms:
        lines.append(f"{_sum(total, term)} = {total + term}")
        total += term
    return "\n".join([*lines, _answer(total)])


def _numbers(problem: str) -> list[int]:
    return list(map(int, re.findall(r"[+-]?\d+", problem)))


def _sum(total: int, term: int) -> str:
    return f"{total} {'+' if term > 0 else '-'} {abs(term)}"


def _answer(total: int) -> str:
    return f"Answer: {total}"


def _problem(links: int, rng: random.Random) -> str:
    start = total = rng.randint(1, LARGEST_TOTAL)
    terms = []
    for _ in range(links):
        term = rng.randint(1, LARGEST_TERM)
        if total + term > LARGEST_TOTAL or total > term and rng.random() < 0.5:
            term = -term
        terms.append(f"{term:+d}")
        total += term
    return f"Start with {start}. Then: {', '.join(terms)}."


def _links(rng: random.Random) -> int:
    return max(2, min(MOST_LINKS, round(MEDIAN_LINKS * rng.lognormvariate(0.0, SIGMA))))


EXAMPLES: Prompt = [
    message
    for problem in ("Start with 57. Then: +8, -3, +4.", "Start with 20. Then: -6, -9, +5, +7, -1.")
    for message in ({"role": "user", "content": problem}, {"role": "assistant", "content": solution(problem)})
]
