"""The benchmark's arithmetic, commands and files: no server, no SGLang."""

import dataclasses
import importlib.util
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from er_sglang.bench import report
from er_sglang.bench.arms import Arm, keep_profile, server_args, server_env, server_name, servers
from er_sglang.bench.load import Completion, LoadResult, Request, interpolate, payload, random_prompts
from er_sglang.bench.shapes import SHAPES, W4_DRAFT, model_config, write_model
from er_sglang.config import AUTO_WINDOWS, SIMULATE_ACCEPTANCE_ENV, load_config, simulated_acceptance
from er_sglang.policy.profile import Profile
from er_sglang.quantize.blocks import MAX_ROWS, SHARED_BYTES, SMALL_BATCH, Blocks, Wave, choose_blocks, shared_bytes
from er_sglang.steering.control import Control, replaced
from er_sglang.tools.plots import Bin
from er_sglang.tools.results import environment, table, write_json, write_rows
from er_sglang.tools.serving import CPU_ARGS, server_command
from tests.profiles import flat_profile

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (it comes with sglang)"
)


def completion(start_s=0.0, times_s=(1.0, 2.0, 3.0), tokens=(1, 5, 9), **meta_info):
    return Completion(start_s=start_s, end_s=times_s[-1], times_s=times_s, tokens=tokens, text="", meta_info=meta_info)


def result(*completions, began_unix_s=0.0):
    return LoadResult(began_unix_s=began_unix_s, completions=completions)


# ---------------------------------------------------------------- load


def test_random_prompts_stay_inside_the_vocabulary():
    prompts = random_prompts(5, seed=0, tokens=300, vocab=128)
    assert {len(p) for p in prompts} == {300} and len(set(prompts)) == 5
    assert all(0 < token < 128 for p in prompts for token in p)


def test_one_call_carries_all_requests_and_names_prompts_by_their_kind():
    assert payload([Request(prompt="a", max_new_tokens=3)])["text"] == ["a"]
    two = [Request(prompt=(4, 5), max_new_tokens=n, ignore_eos=True, stream_interval=8) for n in (3, 7)]
    body = payload(two)
    assert body["input_ids"] == [(4, 5), (4, 5)] and "text" not in body
    assert body["sampling_params"][1] == {
        "temperature": 1.0,
        "max_new_tokens": 7,
        "ignore_eos": True,
        "stream_interval": 8,
    }
    asks = payload([*two, Request(prompt=(4, 5), max_new_tokens=3, options="all")])
    assert asks["return_logprob"] == [False, False, True]
    assert asks["sampling_params"][2]["top_p"] == 0.95 and "return_logprob" not in asks["sampling_params"][2]


@pytest.mark.parametrize("x, y", [(-1, 0), (0, 0), (0.5, 5), (1, 10), (2, 15), (3, 20), (9, 20)])
def test_interpolate(x, y):
    assert interpolate(x, (0, 1, 3), (0, 10, 20)) == y


def test_steady_rate_counts_only_the_full_batch():
    early = completion(times_s=(1.0, 2.0, 3.0), tokens=(1, 5, 9))
    late = completion(times_s=(2.0, 3.0, 7.0), tokens=(1, 5, 21))
    both = result(early, late)
    assert both.steady_window_s() == (2.0, 3.0)
    assert both.steady_tokens_per_s() == 8.0
    assert (both.total_tokens, both.wall_s, both.tokens_per_s) == (30, 7.0, 30 / 7)
    assert [both.running_at(t) for t in (0.5, 1.0, 2.5, 3.0, 7.0)] == [0, 1, 2, 1, 0]


def test_requests_that_never_run_together_have_no_steady_window():
    queued = completion(start_s=0.0, times_s=(4.0, 5.0), tokens=(1, 2))
    with pytest.raises(ValueError, match="less concurrency"):
        result(completion(), queued).steady_tokens_per_s()


def test_accept_length_is_tokens_per_step_over_all_requests():
    assert result(completion(), completion()).accept_length == 1.0
    one, two = completion(tokens=(1, 5, 9), spec_verify_ct=2), completion(tokens=(1, 2, 3), spec_verify_ct=2)
    assert result(one, two).accept_length == (8 + 2) / 4


# ---------------------------------------------------------------- arms


@pytest.mark.parametrize("text", ["plain", "standalone:3", "self_quant:3", "self_quant:0", "auto:7", "paper:11"])
def test_an_arm_is_written_as_it_is_read(text):
    assert str(Arm.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "eagle:3", "self_quant", "self_quant:", "self_quant:-1", "standalone:0", "auto:0", "paper:3", "plain:1"],
)
def test_unknown_arms_are_refused_with_the_choices(text):
    with pytest.raises(ValueError, match="choose plain, standalone:G"):
        Arm.parse(text)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_stated_accept_length_is_the_mean_of_the_geometric_rule(alpha, gamma):
    arm = Arm.parse(f"self_quant:{gamma}")
    assert arm.expected_accept_length(alpha) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
    rng = random.Random(0)
    emitted = []
    for _ in range(20_000):
        accepted = 0
        while accepted < gamma and rng.random() < alpha:
            accepted += 1
        emitted.append(accepted + 1)
    assert arm.expected_accept_length(alpha) == pytest.approx(sum(emitted) / len(emitted), rel=0.02)


def test_arms_that_do_not_draft_emit_one_token_a_step():
    assert (
        Arm.parse("plain").expected_accept_length(0.9) == Arm.parse("self_quant:0").expected_accept_length(0.9) == 1.0
    )


def test_acceptance_is_stated_equally_and_only_to_arms_that_draft():
    standalone, self_quant = Arm.parse("standalone:3"), Arm.parse("self_quant:3")
    assert float(server_env([standalone], 0.9, {})["SGLANG_SIMULATE_ACC_LEN"]) == pytest.approx(3.439)
    assert simulated_acceptance((0,), server_env([self_quant], 0.9, {})) == {0: 0.9}
    for arm, alpha in (
        (Arm.parse("plain"), 0.9),
        (Arm.parse("self_quant:0"), 0.9),
        (standalone, None),
        (self_quant, None),
    ):
        assert not [name for name in server_env([arm], alpha, {}) if "SIMULATE" in name]


def arms_of(text: str) -> list[Arm]:
    return [Arm.parse(word) for word in text.split()]


def served(text: str, config: dict = {}):
    """The plugin's settings on the server of these arms."""
    arms = arms_of(text)
    gamma = server_args(arms, None, idle_gamma=3)["speculative-num-steps"]
    return load_config(None, gamma, server_env(arms, None, config))


def test_self_quant_settings_are_ones_the_plugin_accepts():
    drafts = served("self_quant:3", {"drafter": {"weights": "fp8"}})
    assert drafts.policy.gammas == (3,) and drafts.drafter.weights == "fp8"
    assert served("auto:3").policy.gammas == (1, 2, 3)
    assert served("paper:11").policy.gammas == (5, 7, 9, 11)
    assert served("paper:7").policy.gammas == (5, 7)
    assert served("self_quant:0").policy.gammas == ()


def test_self_quant_arms_share_a_server_and_others_do_not():
    arms = arms_of("self_quant:3 plain auto:7 standalone:3 self_quant:0 standalone:5")
    assert [" ".join(map(str, group)) for group in servers(arms)] == [
        "plain",
        "standalone:3",
        "standalone:5",
        "self_quant:3 auto:7 self_quant:0",
    ]
    assert [server_name(group) for group in servers(arms)] == ["plain", "standalone-3", "standalone-5", "self_quant"]
    assert servers(arms_of("plain")) == [tuple(arms_of("plain"))]


@pytest.mark.parametrize(
    "arms, gammas, measures",
    [
        ("self_quant:0 self_quant:3", (3,), False),
        ("self_quant:0 self_quant:0", (), False),
        ("self_quant:5 self_quant:3", (3, 5), False),
        ("auto:7 self_quant:4", (1, 2, 3, 4, 5, 7), True),
        ("auto:7 paper:11 self_quant:3 self_quant:0", (1, 2, 3, 5, 7, 9, 11), True),
    ],
)
def test_a_shared_server_can_be_switched_to_each_of_its_arms(arms, gammas, measures):
    """It prepares what they draft and no more, and measures only for arms that decide by it."""
    config = served(arms)
    assert (config.policy.gammas, config.policy.needs_profile) == (gammas, measures)
    now = Control(policy=config.policy, simulated_acceptance={0: 0.9})
    for arm in arms_of(arms):
        now = replaced(now, {"self_quant": arm.settings(0.8)}, prepared=gammas, measured=gammas if measures else ())
        assert now.policy.gammas == arm.policy_config.gammas and now.policy.mode == arm.policy_config.mode
        assert now.simulated_acceptance == {0: 0.8} or arm.gamma == 0


def test_the_step_times_that_a_server_decides_by_are_kept(tmp_path):
    measured, out = tmp_path / "cache.json", tmp_path / "out"
    out.mkdir()
    flat_profile().save(measured)
    keep_profile(SimpleNamespace(self_quant=lambda: {"profile": None}), arms_of("self_quant:3"), out)
    keep_profile(SimpleNamespace(), arms_of("plain"), out)
    assert not list(out.iterdir())
    keep_profile(SimpleNamespace(self_quant=lambda: {"profile": str(measured)}), arms_of("auto:7"), out)
    assert Profile.read(out / "profile.json").costs(1, 100) == flat_profile().costs(1, 100)


def test_an_arm_states_its_acceptance_only_if_it_has_one():
    assert Arm.parse("auto:3").settings(0.8) == {"mode": "auto", "ladder": [1, 2, 3], "simulate_acceptance": 0.8}
    assert Arm.parse("self_quant:3").settings(None) == {"mode": "always", "fixed_gamma": 3}
    assert Arm.parse("self_quant:0").settings(0.8) == {"mode": "off"}


def test_an_arm_states_an_acceptance_for_every_window_that_auto_chooses_from():
    arm = Arm.parse("auto:3")
    stated = arm.settings(0.8, {256: 0.5})["simulate_acceptance"]
    assert stated == {"0": 0.8, "128": 0.8, "256": 0.4, "512": 0.8, "1024": 0.8}
    assert simulated_acceptance(AUTO_WINDOWS, {SIMULATE_ACCEPTANCE_ENV: json.dumps(stated)}) == {
        0: 0.8,
        128: 0.8,
        256: 0.4,
        512: 0.8,
        1024: 0.8,
    }


def test_self_quant_that_never_drafts_reserves_what_drafting_would():
    for arms, gamma in (("self_quant:0", 5), ("self_quant:3", 3), ("self_quant:0 auto:7 self_quant:3", 7)):
        assert server_args(arms_of(arms), None, idle_gamma=5)["speculative-num-steps"] == gamma


def test_standalone_drafts_a_chain(tmp_path):
    args = server_args(arms_of("standalone:4"), tmp_path, idle_gamma=4)
    assert (args["speculative-num-steps"], args["speculative-eagle-topk"], args["speculative-num-draft-tokens"]) == (
        4,
        1,
        5,
    )
    assert args["speculative-draft-model-path"] == tmp_path


# ---------------------------------------------------------------- commands and models


def test_server_command():
    args = {"disable-x": True, "y": False, "z": None, "cuda-graph-bs": [1, 2], "host": "0.0.0.0"}
    command = server_command("policy", 123, args, ["--tp", "2"])
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert command[3:] == "--model-path policy --host 0.0.0.0 --port 123 --disable-x --cuda-graph-bs 1 2 --tp 2".split()


def test_cpu_flags_ask_for_no_kernels():
    text = " ".join(server_command("policy", 1, CPU_ARGS))
    assert "--device cpu --attention-backend torch_native --sampling-backend pytorch" in text
    assert "--disable-overlap-schedule --max-total-tokens" in text


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fit_group_128_and_tensor_cores(shape, tmp_path):
    config = json.loads((write_model(tmp_path, shape) / "config.json").read_text())
    assert config == model_config(shape) and "quantization_config" not in config
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert head_dim(config) in (64, 128)


def head_dim(config: dict) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


@pytest.mark.parametrize(
    "shape, parameters_e9",
    [("0.5b", 0.5), ("7b", 7.6), ("14b", 14.8), ("32b", 32.8), ("qwen3-4b", 4.0), ("qwen3-8b", 8.2)],
)
def test_shapes_have_the_size_of_their_name(shape, parameters_e9):
    c = model_config(shape)
    attention = c["hidden_size"] * head_dim(c) * 2 * (c["num_attention_heads"] + c["num_key_value_heads"])
    mlp = 3 * c["hidden_size"] * c["intermediate_size"]
    embeddings = (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * c["hidden_size"]
    total = c["num_hidden_layers"] * (attention + mlp) + embeddings
    assert total / 1e9 == pytest.approx(parameters_e9, abs=0.1)


def test_the_quantized_draft_lies_beside_the_model(tmp_path):
    plain, draft = write_model(tmp_path, "tiny"), write_model(tmp_path, "tiny", quantized=True)
    assert plain != draft
    assert json.loads((draft / "config.json").read_text())["quantization_config"] == W4_DRAFT


# ---------------------------------------------------------------- report


def test_table():
    rows = [
        {"arm": "plain", "rate": 1234.56, "n": 16384, "a": None},
        {"arm": "self_quant:3", "rate": 0.98765, "n": 7, "a": 1.0},
    ]
    assert table(rows).splitlines() == [
        "|          arm |  rate |      n | a |",
        "|-------------:|------:|-------:|--:|",
        "|        plain |  1235 | 16,384 | - |",
        "| self_quant:3 | 0.988 |      7 | 1 |",
    ]


def test_environment_names_command_hardware_and_versions(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "bench", "two words"])
    found = environment()
    assert found["command"] == "python -m bench 'two words'"
    assert found["hardware"]["cpu_cores"] >= 1 and found["versions"]["torch"]
    json.dumps(found)


def test_rows_are_written_and_shown(tmp_path, capsys):
    write_rows(tmp_path / "out", [{"rows": 8, "us": 1.5}], bandwidth=2.0)
    raw = json.loads((tmp_path / "out/results.json").read_text())
    assert raw["rows"] == [{"rows": 8, "us": 1.5}] and raw["bandwidth"] == 2.0 and raw["environment"]["hardware"]
    text = (tmp_path / "out/table.md").read_text()
    assert "|    8 | 1.5 |" in text and text in capsys.readouterr().out


def test_plots_and_raw_data_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the plot extra")
    speculative = result(completion(), completion())
    bins = [
        Bin(time_s=1.0, batch=2.0, gamma=3.0, accept_length=2.5, tokens_per_s=5.0),
        Bin(time_s=2.0, batch=None, gamma=None, accept_length=None, tokens_per_s=0.0),
    ]
    results = {"plain": result(completion()), "self_quant:3": speculative}
    report.plot_loads(tmp_path / "timeline.png", results, {"self_quant:3": bins}, "title")
    rows = [{"arm": arm, "concurrency": c, "tokens/s": 10.0 * c} for arm in ("plain", "self_quant:3") for c in (1, 8)]
    report.plot_grid(tmp_path / "grid.png", rows, "title")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("timeline.png", "grid.png"))
    write_json(tmp_path / "results.json", {"results": {"self_quant:3": speculative}})
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["results"]["self_quant:3"]["completions"][0]["tokens"] == [1, 5, 9]


@needs_transformers
def test_the_quick_start_plots_the_load_and_not_what_came_before_it(tmp_path):
    from er_sglang.bench.quickstart import trace_bins

    trace = tmp_path / "trace.jsonl"
    steps = [
        {"time_s": 90.0 + i, "batch": 2, "gamma": 3 if i < 20 else 1, "accepted": 4 if i < 20 else 1, "mode": "always"}
        for i in range(40)
    ]
    steps += [{**steps[-1], "time_s": 130.0 + i, "mode": "auto"} for i in range(10)]
    trace.write_text("".join(json.dumps(step) + "\n" for step in steps))
    bins = trace_bins(trace, result(completion(), began_unix_s=99.5), "always")
    assert bins[0].time_s == pytest.approx(0.5, abs=0.5) and bins[-1].time_s == pytest.approx(29.5, abs=0.5)
    assert [(each.gamma, each.accept_length) for each in bins if each.gamma] == [(3, 3.0)] * 10 + [(1, 1.5)] * 20


@needs_transformers
def test_the_gpus_times_of_the_quick_start_are_the_readmes():
    """The package brings a copy, for launch/results is not installed."""
    from er_sglang.bench.quickstart import GPU_PROFILE

    measured = Path(__file__).parents[2] / "launch/results/2026-11-27-h100/14b-fused-8/profile.json"
    assert GPU_PROFILE.read_bytes() == measured.read_bytes()


@needs_transformers
def test_the_quick_start_ends_on_what_auto_did_and_on_a_gpus_times():
    from er_sglang.bench.quickstart import on_a_gpu, verdict

    rows = [{"tokens/s": rate} for rate in (100.0, 40.0, 99.0)]
    steps = {"gamma=0:slower": 90, "gamma=1:probe": 10}
    said = verdict(rows, steps)
    assert "ran at 0.99 x" in said and "slower here" in said and "90 of its 100 steps" in " ".join(said.split())
    assert "slower here" not in verdict([{"tokens/s": rate} for rate in (100.0, 140.0, 150.0)], steps)
    speed_ups = [
        float(on_a_gpu([alpha] * 3).replace("\n", " ").partition(" x the speed")[0].split()[-1])
        for alpha in (0.2, 0.95)
    ]
    assert 0.98 < speed_ups[0] < 1.02 and speed_ups[1] > 1.3


@needs_transformers
def test_the_quick_start_gives_every_arm_the_same_lengths():
    from er_sglang.bench.quickstart import as_long_as

    asked = Request(prompt="017:", max_new_tokens=512, temperature=0.7)
    again = as_long_as([asked, asked], result(completion(), completion(tokens=(3,), times_s=(1.0,))))
    assert again == [dataclasses.replace(asked, max_new_tokens=length, ignore_eos=True) for length in (9, 3)]


# ---------------------------------------------------------------- the toy policy


@needs_transformers
def test_countdowns_are_legal_and_their_length_follows_the_prompt():
    from er_sglang.bench import toy

    rng = random.Random(0)
    for count in (1, 7, 100, 999):
        response = toy.respond(count, rng)
        assert response.endswith("000") and toy.valid_steps(toy.prompt(count), response) == 1.0
        assert 4 * count / 5 - 1 <= len(response) <= 4 * count
    assert toy.valid_steps("009:", "008,001,000") < 1.0  # a step of seven
    assert toy.valid_steps("009:", "008,005") < 1.0  # does not reach zero
    assert toy.valid_steps("009:", "") == 0.0


@needs_transformers
def test_tokenizer_is_one_token_a_character_and_survives_a_round_trip(tmp_path):
    from transformers import AutoTokenizer

    from er_sglang.bench import toy

    toy.make_tokenizer(128).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "041:039,000 ~A z"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and max(ids) < 97 and tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    with pytest.raises(ValueError, match="at least 97"):
        toy.make_tokenizer(96)


@needs_transformers
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_policies_are_neither_flat_nor_certain(family, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    from er_sglang.bench import toy

    shape = toy.PolicyShape(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(toy.make_random_policy(tmp_path, family, shape=shape))
    assert model.config.model_type == family and model.dtype == torch.float32
    assert model.config.tie_word_embeddings is tied
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == (family == "qwen2")
    ids = torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    top = model(ids).logits.softmax(-1).amax(-1).mean().item()
    assert 0.15 < top < 0.85


@needs_transformers
def test_outlier_channels_keep_the_function():
    from er_sglang.bench import toy

    model = toy.make_model("qwen3", toy.PolicyShape(), seed=0)
    ids = torch.arange(2, 34)[None]
    before, weight = model(ids).logits, model.model.layers[0].self_attn.q_proj.weight.clone()
    toy.spread_channels(model, sigma=0.75, seed=0)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, weight, rtol=0.1)


@needs_transformers
def test_training_learns_the_task(tmp_path):
    from transformers import AutoModelForCausalLM

    from er_sglang.bench import toy

    path = toy.make_toy_policy(tmp_path, shape=toy.PolicyShape(), steps=20)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids, labels, positions = toy.training_batch(toy.make_tokenizer(128), random.Random(1), rows=8, max_tokens=64)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, position_ids=positions).loss.item()
    assert loss < 3.3  # log(128) = 4.85 untrained


def test_a_cycle_is_summarized_by_kind_and_gap():
    from er_sglang.bench.cycle import Kernel, summarize

    def cycle(at: float) -> list[Kernel]:
        return [
            Kernel("void marlin::Marlin<bf16>", at + 1, 10),
            Kernel("FlashAttnFwd", at + 13, 4),
            Kernel("flashinfer::norm::FusedAddRMSNorm", at + 15, 3),  # overlaps the one before
            Kernel("_emit_kernel", at + 18, 2),
        ]

    summary = summarize([*cycle(0), *cycle(20), *cycle(40)])
    assert summary["cycles"] == 2 and summary["kernels"] == 4
    assert summary["cycle_ms"] == pytest.approx(0.020)
    assert summary["gaps_ms"] == pytest.approx(0.003) and summary["largest_gap_us"] == pytest.approx(2)
    assert {row["kind"]: row["ms"] for row in summary["kinds"]} == pytest.approx(
        {"int4 GEMM": 0.010, "attention": 0.004, "norm": 0.003, "draw and judge": 0.002}
    )
    assert Kernel("er_sglang::fused_layer_kernel(er_sglang::Layer)", 0, 60).kind == "int4 GEMM"
    with pytest.raises(ValueError, match="no whole cycle"):
        summarize(cycle(0))


# ---------------------------------------------------------------- products of a draft step


@pytest.mark.parametrize("model", SHAPES)
def test_products_are_those_of_a_layer(model):
    from er_sglang.bench.gemm import products

    transformers = pytest.importorskip("transformers", reason="it comes with sglang")
    fields = {**model_config(model), "num_hidden_layers": 1, "vocab_size": 8}
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        layer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0]
    linears = {
        name.rpartition(".")[2]: tuple(m.weight.shape)
        for name, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }

    def fused(*names):
        (k,) = {linears[name][1] for name in names}
        return sum(linears[name][0] for name in names), k

    assert products(SHAPES[model]) == {
        "qkv": fused("q_proj", "k_proj", "v_proj"),
        "o": fused("o_proj"),
        "gate_up": fused("gate_proj", "up_proj"),
        "down": fused("down_proj"),
        "lm_head": (SHAPES[model]["vocab_size"], config.hidden_size),
    }


def test_every_shape_is_one_that_the_kernels_can_run():
    from er_sglang.bench.gemm import all_shapes

    def blocks(k: int) -> list[Blocks]:
        return [shape for shape in all_shapes(SMALL_BATCH, 512, k) if isinstance(shape, Blocks)]

    assert len(set(blocks(5120))) == 3 * 5  # all
    large = blocks(96000)
    assert large and all(shared_bytes(96000, shape) <= SHARED_BYTES for shape in large)
    assert len(large) < 3 * 5
    assert list(all_shapes(SMALL_BATCH + 1, 640, 5120)) == [(Wave(3, splits),) for splits in range(1, 9)]
    assert list(all_shapes(MAX_ROWS, 640, 256)) == [(Wave(3, 1),), (Wave(3, 2),)]
    assert not list(all_shapes(MAX_ROWS + 1, 640, 5120))


@pytest.mark.parametrize("n, k", [(7168, 5120), (27648, 5120), (5120, 13824)])
def test_the_chosen_blocks_are_among_them(n, k):
    from er_sglang.bench.gemm import all_shapes

    assert choose_blocks(n, k, multiprocessors=132) in [*all_shapes(1, n, k)]


# ---------------------------------------------------------------- rollouts


def rollout_args(*words):
    from er_sglang.bench import rollout

    return rollout.parse_args(["--no-plot", *words])


def test_an_arm_that_drafts_is_run_at_every_acceptance_and_others_once():
    from er_sglang.bench import rollout

    args = rollout_args(
        "--arms", "plain", "self_quant:0", "auto:7", "paper:11", "--acceptance", "0.6", "0.9", "--rollouts", "2"
    )
    assert rollout.count(args) == 2 * (1 + 1 + 2 + 2)


@pytest.mark.parametrize("words", [("--arms", "standalone:3"), ("--acceptance", "0.9", "1.5")])
def test_rollouts_that_cannot_be_run_are_refused(words):
    with pytest.raises(SystemExit):
        rollout_args(*words)


def test_tokens_by_running_requests():
    from er_sglang.bench.rollout import by_running

    ends_s = ((1.0, 2.0), (1.0, 3.0), (1.0, 4.0), (1.0, 4.0, 6.0))
    tokens = ((1, 9), (1, 9), (1, 13), (1, 10, 12))
    requests = [completion(times_s=times_s, tokens=received) for times_s, received in zip(ends_s, tokens)]
    assert by_running(result(*requests)) == [
        {"running_up_to": 4, "seconds": 2.0, "tokens": 30.0, "tokens_per_s": 15.0},
        {"running_up_to": 2, "seconds": 1.0, "tokens": 7.0, "tokens_per_s": 7.0},
        {"running_up_to": 1, "seconds": 2.0, "tokens": 2.0, "tokens_per_s": 1.0},
    ]


def run_of(arm, acceptance, wall_s, change=None):
    return {
        "arm": arm,
        "acceptance": acceptance,
        "options": "default",
        "rollout": 0,
        "wall_s": wall_s,
        "tokens_per_s": 1.0,
        "accept_length": 1.0,
        "self_quant_after": change and {"settings_version": change},
    }


def test_a_servers_trace_is_split_by_arm(tmp_path):
    from er_sglang.bench.rollout import split_trace

    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(
            json.dumps({"settings_version": change, "step": step}) + "\n" for step, change in enumerate([0, 1, 1, 2])
        )
        + '{"ended": "trace_max_mb: 256 MB"}\n'
    )
    runs = [run_of("plain", None, 4.0), run_of("self_quant:0", None, 4.0, 1), run_of("auto:7", 0.8, 3.0, 2)]
    paths = split_trace(trace, tmp_path, runs)
    assert [path.name for path in paths] == ["trace-self_quant-0.jsonl", "trace-auto-7-0.8.jsonl"]
    assert [[json.loads(line)["step"] for line in path.read_text().splitlines()] for path in paths] == [[1, 2], [3]]


def test_rollouts_are_compared_with_plain_and_with_the_prediction():
    from er_sglang.bench.rollout import table_rows
    from er_sglang.policy.profile import Sample

    cells = [("target", 0, 10e-3), ("draft", 0, 1e-3), ("verify", 3, 10e-3)]
    profile = Profile.from_samples(
        [Sample(phase, gamma, b, c, s) for phase, gamma, s in cells for b in (1, 64) for c in (8, 512)]
    )
    runs = [run_of("self_quant:3", 1.0, 2.0, 1), run_of("plain", None, 4.0), run_of("auto:7", 0.8, 3.0, 2)]
    args = rollout_args("--arms", "plain", "self_quant:3", "auto:7", "--lengths", "fixed:40")
    rows = table_rows(runs, profile, args)
    assert [(row["arm"], row["x plain"]) for row in rows] == [("plain", 1.0), ("self_quant:3", 2.0), ("auto:7", 4 / 3)]
    assert rows[0]["predicted s"] == pytest.approx(40 * 10e-3)
    assert rows[1]["predicted s"] == pytest.approx(10 * 13e-3)  # four tokens a cycle
    assert rows[2]["predicted s"] is None  # its longest drafts were not measured


def test_an_arm_is_compared_with_a_drafting_one_at_the_same_acceptance():
    from er_sglang.bench.rollout import table_rows

    runs = [run_of("self_quant:3", 0.6, 6.0, 1), run_of("self_quant:3", 0.9, 3.0, 2)]
    runs += [run_of("auto:7", 0.6, 4.0, 3), run_of("auto:7", 0.9, 2.0, 4), run_of("self_quant:0", None, 4.0, 5)]
    args = rollout_args("--arms", "self_quant:3", "auto:7", "self_quant:0", "--acceptance", "0.6", "0.9")
    assert [row["x self_quant:3"] for row in table_rows(runs, None, args)] == [1.0, 1.0, 1.5, 1.5, None]


# ---------------------------------------------------------------- the README's speeds


def test_one_server_does_for_every_workload_of_the_readme(tmp_path, monkeypatch):
    from er_sglang.bench import readme

    monkeypatch.setattr(readme, "ON_CPU", False)
    monkeypatch.setattr(readme, "Server", lambda model, args, **more: args)
    args = readme.parse_args(["--out", str(tmp_path)])
    planned = readme.plan(args)
    assert [each.out.name for _, each in planned] == list(readme.WORKLOADS)
    flags = readme.start_server(planned, args, tmp_path)
    assert flags["max-running-requests"] == 128 and flags["context-length"] > 8000
    assert flags["speculative-num-steps"] == 7


def test_a_table_has_what_is_gained_over_the_first_arm():
    from er_sglang.bench.decode import against_first

    rows = [
        {"arm": arm, "options": options, "concurrency": 8, "tokens/s": rate}
        for arm, options, rate in (("plain", "default", 10.0), ("plain", "top_p", 5.0), ("auto:7", "top_p", 10.0))
    ]
    assert [row["x plain"] for row in against_first(rows)] == [1.0, 1.0, 2.0]


# ---------------------------------------------------------------- real policies


def test_weights_leave_their_grid_by_less_than_half_a_step(tmp_path):
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from er_sglang.bench.real import off_grid

    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config.er_sglang_origin = "made here"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for weight in model.parameters():
        weight.data = weight.data.mul(400).round().div(400)  # a grid
    model.save_pretrained(tmp_path / "policy")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(
        tmp_path / "policy"
    )

    path = off_grid(tmp_path / "policy")
    moved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert "moved off" in moved.config.er_sglang_origin
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert len(linear) == 7
    for name, weight in model.named_parameters():
        difference = moved.get_parameter(name).detach().float() - weight.detach().float()
        if name.removesuffix(".weight") not in linear:
            assert not difference.any()
            continue
        largest = weight.detach().float().unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
        shares = difference.unflatten(1, (-1, 32)) / largest
        assert shares.abs().max() < 1 / 32 + 2**-8  # and rounding to bf16
        assert shares.std() > 1 / 32 / 3**0.5 * 0.9
    (path / "mark").touch()
    assert off_grid(tmp_path / "policy") == path and (path / "mark").exists()
