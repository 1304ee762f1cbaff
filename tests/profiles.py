"""Profiles made of formulas."""

from collections.abc import Callable

from er_sglang.policy.profile import Profile, Sample

LADDER = (1, 2, 3, 5, 7)


def make_profile(
    target_s: Callable[[int, int], float],
    draft_s: Callable[[int, int], float],
    verify_s: Callable[[int, int, int], float],
    gammas=LADDER,
    batches=(1, 8, 32, 64, 128),
    contexts=(512, 4096),
) -> Profile:
    """Seconds by batch and context, and of a verify by gamma."""
    samples = []
    for b in batches:
        for c in contexts:
            samples.append(Sample("target", 0, b, c, target_s(b, c)))
            samples.append(Sample("draft", 0, b, c, draft_s(b, c)))
            samples += [Sample("verify", g, b, c, verify_s(b, c, g)) for g in gammas]
    return Profile.from_samples(samples)


def flat_profile(target_s=1.0, draft_s=0.3, verify_s=1.1, gammas=LADDER) -> Profile:
    """A step takes as long whatever the batch and the context."""
    return make_profile(
        lambda b, c: target_s, lambda b, c: draft_s, lambda b, c, g: verify_s, gammas, (1, 64), (100, 4000)
    )
