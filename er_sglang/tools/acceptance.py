"""`er-sglang acceptance`: what a checkpoint accepts of each drafter's proposals, before any server runs."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from er_sglang.config import HEADS, SINK_TOKENS, WEIGHT_FORMATS, WINDOW_RULES, DrafterConfig
from er_sglang.errors import ConfigError

_DESCRIPTION = f"""\
Measure how often a policy accepts what a quantized copy of itself drafts: for each weight format, group size, head and
attention window, per draft position, by temperature and context length. Needs transformers, and no server; runs on a
CPU or a GPU. Feed the result to `er-sglang simulate --acceptance` to learn what drafting would bring.

The policy answers the prompts itself. Each drafter then drafts at every token of these responses as it would in a
server: on the policy's own KV cache, with keys of its own for the chain alone. Figures are those that a server counts
which drafts --gamma tokens in every step.

  alpha i         conditional acceptance of the i-th drafted token: tried only where the earlier ones were accepted
  accept length   tokens a cycle emits, the bonus token included: 1 + alpha 1 + alpha 1 * alpha 2 + ...
  copy, MB        memory of the quantized weights (10^6 bytes); with the policy's head a draft reads that, too
  against first   difference of accept length to the first drafter of the table, on the same texts
  [low, high]     95 % interval, by a bootstrap over prompts: give at least ten

What decides is, in this order: the formats' difference against their bytes, and how much a window costs in contexts much
longer than it. A window (so many tokens besides {SINK_TOKENS} at the ends) costs nothing in shorter ones, so give prompts as long
as your own, or --context-tokens. All drafters have the first of --windows; its others are tried with the first of
--weights, --group-sizes and --heads.
"""

_EXAMPLES = """examples:
  Your policy and your prompts, as an RL step samples them:
    er-sglang acceptance Qwen/Qwen2.5-7B-Instruct --prompts train.jsonl --new-tokens 1024
  Which window? Built-in documents of 4096 tokens as context:
    er-sglang acceptance CHECKPOINT --context-tokens 4096 --windows 0,128,256,512 --window-by recency,attention --weights int4
  Do smaller groups pay?
    er-sglang acceptance CHECKPOINT --weights int4 --group-sizes 128,64
  Then, with step times of your GPU:
    er-sglang simulate --profile profile.json --acceptance acceptance-results/acceptance.json
"""

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 1 << 30)  # of context lengths, in tokens


def add_command(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "acceptance",
        help="measure what a checkpoint accepts, by weight format and attention window, without a server",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="a Hugging Face checkpoint folder, or a name on the hub")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a JSON object a line: {"prompt": text or messages} or {"messages": [...]} (default: a dozen built-in ones)',
    )
    add(
        "--context-tokens",
        type=int,
        default=0,
        metavar="N",
        help="built-in prompts about a document of N tokens instead (modules of this Python's standard library)",
    )
    add("--raw", action="store_true", help="prompts are continued as they are, without the chat template")
    add("--limit", type=int, metavar="N", help="use the first N prompts")
    add("--samples", type=int, default=1, metavar="N", help="responses to each prompt (default %(default)s)")
    add("--new-tokens", type=int, default=256, metavar="N", help="longest response (default %(default)s)")
    add("--ignore-eos", action="store_true", help="all responses have that length")
    add("--temperatures", type=_floats, default="1.0", help="comma-separated; 0 is greedy (default %(default)s)")
    add("--weights", type=_words(WEIGHT_FORMATS), default=",".join(WEIGHT_FORMATS), help="default %(default)s")
    add("--group-sizes", type=_ints, default="128", help="of int4 formats: 128, 64 or 32 (default %(default)s)")
    add(
        "--heads",
        type=_words(HEADS),
        default=",".join(HEADS),
        help="lm_head of the drafter: int4, int4_rescored, whose leading tokens are scored again with the policy's rows, or "
        "policy, which shares the policy's (default %(default)s)",
    )
    add("--windows", type=_ints, default="0", help="tokens that a draft attends to, 0: all (default %(default)s)")
    add(
        "--window-by",
        type=_words(WINDOW_RULES),
        default=DrafterConfig().window_by,
        help="which tokens: the last ones, or those that the cycle before attended to most, one of all accepted drafts "
        "(default %(default)s; comma-separated)",
    )
    add("--gamma", type=int, default=3, metavar="G", help="drafted tokens a cycle (default %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="responses sampled at once (default %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="to compute in (default: the checkpoint's)")
    add("--seed", type=int, default=0)
    add(
        "--out",
        type=Path,
        default=Path("acceptance-results"),
        metavar="DIR",
        help="folder for acceptance.json, table.md and plot.png (default %(default)s)",
    )
    parser.set_defaults(run=run)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in text.split(","))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(value) for value in text.split(","))


def _words(known: Sequence[str]):
    def words(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return tuple(text.split(","))

    return words


def run(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from er_sglang.offline import texts
    from er_sglang.offline.drafters import Policy
    from er_sglang.offline.measure import measure, plan
    from er_sglang.tools.results import environment, write_json

    if args.gamma < 1:
        raise ConfigError(f"--gamma is {args.gamma}; draft at least one token.")
    logging.set_verbosity_error()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(args.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    stored = config.dtype or torch.float32
    dtype = getattr(torch, args.dtype) if args.dtype else stored
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype).to(device).eval()
    policy = Policy(model, stored)

    if args.prompts:
        prompts = texts.read_prompts(args.prompts)
    else:
        prompts = texts.long_prompts(tokenizer, args.context_tokens) if args.context_tokens else texts.BUILT_IN
    prompts = [texts.encode(tokenizer, prompt, args.raw) for prompt in prompts[: args.limit]]
    drafters = plan(args.weights, args.group_sizes, args.heads, args.windows, args.window_by)
    content = {
        "environment": environment(),
        "checkpoint": str(args.checkpoint),
        "origin": config.to_dict().get("er_sglang_origin"),
        "model": {name: config.to_dict()[name] for name in ("model_type", "hidden_size", "num_hidden_layers")},
        "dtypes": {"stored": str(stored), "computed": str(dtype), "device": device},
        "gamma": args.gamma,
        "samples": [],
        "rows": [],
    }
    for temperature in args.temperatures:
        responses = texts.respond(
            model,
            prompts * args.samples,
            temperature=temperature,
            new_tokens=args.new_tokens,
            batch=args.batch,
            seed=args.seed,
            ignore_eos=args.ignore_eos,
        )
        responses = [response for response in responses if len(response.tokens) - response.first > args.gamma]
        if not responses:
            raise ConfigError(f"no response is longer than --gamma, {args.gamma} tokens: raise --new-tokens.")
        content["samples"].append(
            {
                "temperature": temperature,
                "responses": len(responses),
                "prompt_tokens": [response.first for response in responses],
                "response_tokens": [len(response.tokens) - response.first for response in responses],
                "example": tokenizer.decode(responses[0].tokens[responses[0].first :][:80]),
            }
        )
        content["rows"] += measure(policy, responses, len(prompts), drafters, temperature, args.gamma, EDGES)

    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "acceptance.json", content)
    table = format_table(content["rows"])
    (args.out / "table.md").write_text(table + "\n")
    plot(content, args.out / "plot.png")
    print(f"\n{table}\n\n{args.out}/: acceptance.json, table.md, plot.png")
    return 0


def name_of(row: dict) -> str:
    """Of a row's drafter."""
    parts = [row["weights"] if row["weights"] == "fp8" else f"{row['weights']} g{row['group_size']}"]
    if row["head"] != "int4":
        parts.append({"policy": "policy's head", "int4_rescored": "rescored head"}[row["head"]])
    if row["attention_window"]:
        parts.append(
            f"window {row['attention_window']}" + (" by attention" if row.get("window_by") == "attention" else "")
        )
    return ", ".join(parts) + (
        f" ({row['unconverted_layers']} layers not converted)" if row["unconverted_layers"] else ""
    )


def context_of(row: dict) -> str:
    low, high = row["context_tokens"] or (0, EDGES[-1])
    return "all" if row["context_tokens"] is None else f"{low}+" if high == EDGES[-1] else f"{low} to {high - 1}"


def format_table(rows: Sequence[dict]) -> str:
    from er_sglang.tools.results import table

    def bounds(pair: Sequence[float], sign: str = "") -> str:
        return f"[{pair[0]:{sign}.3f}, {pair[1]:{sign}.3f}]"

    return table(
        [
            {
                "T": f"{row['temperature']:g}",
                "context": context_of(row),
                "drafter": name_of(row),
                "copy, MB": row["copy_bytes"] / 1e6,
                **{f"alpha {i}": f"{alpha:.3f}" for i, alpha in enumerate(row["alphas"], 1)},
                "alpha 1, interval": bounds(row["alpha_intervals"][0]),
                "accept length": f"{row['accept_length']:.3f} {bounds(row['accept_length_interval'])}",
                "against first": f"{row['against_first']:+.3f} {bounds(row['against_first_interval'], '+')}",
                "cycles": int(row["cycles"]),
                "prompts": row["prompts"],
            }
            for row in rows
        ]
    )


def plot(content: dict, path: Path) -> None:
    """Accept length of every drafter, with its interval: a panel per context length, a colour per temperature."""
    from matplotlib.figure import Figure

    rows = content["rows"]
    contexts = list(dict.fromkeys(context_of(row) for row in rows))
    names = list(dict.fromkeys(name_of(row) for row in rows))
    figure = Figure(figsize=(3.2 + 2.9 * len(contexts), 1.6 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    for panel, context in zip(panels, contexts):
        for index, temperature in enumerate(temperatures):
            shown = [row for row in rows if context_of(row) == context and row["temperature"] == temperature]
            panel.errorbar(
                [row["accept_length"] for row in shown],
                [names.index(name_of(row)) + 0.16 * (index - (len(temperatures) - 1) / 2) for row in shown],
                xerr=[
                    [max(0.0, row["accept_length"] - row["accept_length_interval"][0]) for row in shown],
                    [max(0.0, row["accept_length_interval"][1] - row["accept_length"]) for row in shown],
                ],
                fmt="o",
                markersize=4,
                capsize=2,
                label=f"T = {temperature:g}",
            )
        panel.set(title="all contexts" if context == "all" else f"context {context}", xlabel="accept length")
        panel.set_xlim(1, content["gamma"] + 1)
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    title = f"{Path(content['checkpoint']).name}, gamma {content['gamma']}, intervals over prompts"
    figure.suptitle(
        "\n".join([title, *([textwrap.shorten(content["origin"], 110)] if content["origin"] else [])]), fontsize=9
    )
    figure.savefig(path, dpi=100)
