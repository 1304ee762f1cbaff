"""A drafter with twins of the small modules drafts as one without: their wiring, on a real server, by torch kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.host.policies import make_policy
from tests.host.servers import TWINS, greedy, self_quant

PLUGINS = (TWINS, Path(__file__).parents[1] / "gpu" / "plugin")


@pytest.mark.parametrize(
    ("family", "weights", "more"),
    [
        ("qwen3", "int4", {"apply_gated", "apply_layer"}),
        ("qwen2", "int4", {"apply_gated", "apply_layer"}),  # whose qkv has a bias
        ("llama", "int4", {"apply_gated", "apply_layer"}),
        ("llama", "fp8", {"silu_and_mul"}),
    ],
)
def test_twins_draft_what_the_policys_own_modules_draft(folder, family, weights, more):
    """The plugin compares logits, keys and values at start-up and stops the server unless they are close: of a request, whose
    layers are fused in int4, and of more than that takes."""
    log = folder / f"twins-{family}-{weights}.log"
    policy = make_policy(folder / f"twins-{family}-{weights}", family, seed=3, layers=3)
    config = {"policy": {"mode": "always"}, "drafter": {"weights": weights}}
    with self_quant(policy, log, config, 3, plugins=PLUGINS) as server:
        answer = server.generate({"input_ids": [5, 6, 7], "sampling_params": greedy(12)})
    assert answer["meta_info"]["spec_accept_length"] > 1
    text = log.read_text()
    assert ("Decoder layers fused for a few requests: 2." in text) == ("apply_layer" in more)
    assert len(re.findall(r"^TWIN_CHECK", text, re.MULTILINE)) == 2 * 3  # sizes, tensors
    called = set(re.findall(r"^TWIN_CALL (\w+)", text, re.MULTILINE))
    assert called == {"rms_norm", "add_rms_norm_", "rope_store_", "attend"} | more
