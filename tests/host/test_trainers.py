"""What a trainer reads of a request: true counts of its drafts, by every name that is asked for."""

PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]


def rollout(server, prompts, lengths) -> list[dict]:
    """``meta_info`` of a sampled response of each length."""
    sampling = [{"temperature": 1, "max_new_tokens": length, "ignore_eos": True} for length in lengths]
    answers = server.generate({"input_ids": prompts, "sampling_params": sampling, "return_logprob": True})
    return [answer["meta_info"] for answer in answers]


def test_counts_of_a_request(switching):
    """What a request reports of its drafts adds up to what the server counts, though gamma changes at every step."""
    before = switching.self_quant()
    infos = rollout(switching, PROMPTS, (9, 17, 30, 31))
    after = switching.self_quant()
    counted = {
        name: after[name] - before[name] for name in ("drafted_tokens", "accepted_tokens", "decode_steps", "cycles")
    }
    assert sum(info["spec_num_proposed_drafts"] for info in infos) == counted["drafted_tokens"]
    assert sum(info["spec_num_correct_drafts"] for info in infos) == counted["accepted_tokens"]
    assert max(info["spec_verify_ct"] for info in infos) == counted["decode_steps"] + counted["cycles"]
    for info in infos:
        assert info["spec_accept_rate"] == info["spec_num_correct_drafts"] / info["spec_num_proposed_drafts"]
        assert info["spec_accept_length"] == info["completion_tokens"] / info["spec_verify_ct"]
        assert sum(info["spec_correct_drafts_histogram"]) == info["spec_verify_ct"]
        # Names that SGLang has dropped and slime still reads.
        assert info["spec_draft_token_num"] == info["spec_num_proposed_drafts"]
        assert info["spec_accept_token_num"] == info["spec_num_correct_drafts"]


def test_counts_of_single_steps(switching):
    """Each gamma once, one step per request. Without drafts there is no rate, rather than a rate of zero."""
    gammas = switching.self_quant()["policy"]["cycle"]
    infos = [rollout(switching, PROMPTS[:1], (2,))[0] for _ in gammas]
    assert sorted(info["spec_num_proposed_drafts"] for info in infos) == sorted(gammas)
    for info in infos:
        assert ("spec_accept_rate" in info) == (info["spec_num_proposed_drafts"] > 0)
