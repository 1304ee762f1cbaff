"""Where the time of one cycle goes: GPU kernels by kind and the gaps between them, from SGLang's own profiler.

    python -m er_sglang.bench.cycle --model 7b --gamma 3 --batch 1 16

Random weights at a stated acceptance: times do not depend on what the weights are.
"""

import argparse
import gzip
import json
import re
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from er_sglang.bench.arms import Arm, add_self_quant_config, server_args, server_env, shared_args
from er_sglang.bench.client import run_load
from er_sglang.bench.load import Request, random_prompts
from er_sglang.bench.shapes import SHAPES, write_model
from er_sglang.tools.results import environment, table, write_json
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm

CYCLE_END = "_emit_kernel"  # the last kernel of a cycle
KINDS = (
    ("int4 GEMM", "small_batch_gemm|wgmma_gemm|fused_layer|marlin"),
    ("norm", "norm"),
    ("attention", "flash|attn|fmha"),
    ("choice of tokens", "_sums_kernel|_scores_kernel|_select_kernel|_rank_kernel"),
    (
        "draw and judge",
        "_shape_kernel|_partials_kernel|summarize_rows|_joint_kernel|_rest_kernel|_accept_kernel|_residual_kernel|_emit_kernel",
    ),
    ("rope, KV store", "rope|rotary|kvcache|kv_cache"),
    ("activation", "silu|act_and_mul"),
    ("bf16 GEMM", "nvjet|gemm|gemv|splitk|cutlass"),
    (
        "copy, elementwise",
        "_next_slots|_show_kernel|_load_kernel|elementwise|copy|fill|index|cat|arange|reduce|scatter|gather|mem|scan",
    ),
)
PROFILED_STEPS = 10
WARM_UP_TOKENS = 32
PROFILED_TOKENS = 1500


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS if re.search(pattern, self.name, re.IGNORECASE)), "other")


def read_trace(path: Path) -> list[Kernel]:
    """The GPU work of a PyTorch trace, in order of start."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [
        Kernel(event["name"], event["ts"], event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def summarize(kernels: Sequence[Kernel]) -> dict:
    """Of the cycle of median length: its time, gaps, draft steps, and kernels and time by kind.

    Raises ValueError if the trace holds fewer than two ends of a cycle.
    """
    ends_us = [kernel.end_us for kernel in kernels if CYCLE_END in kernel.name]
    spans = sorted(zip(ends_us, ends_us[1:]), key=lambda span: span[1] - span[0])
    if not spans:
        raise ValueError("no whole cycle was profiled: is the server speculating?")
    begin_us, end_us = spans[len(spans) // 2]
    cycle = [kernel for kernel in kernels if begin_us <= kernel.start_us < end_us]
    by_kind: dict[str, list[float]] = defaultdict(list)
    busy_us, last_us, gaps_us = 0.0, begin_us, []
    for kernel in cycle:
        by_kind[kernel.kind].append(kernel.duration_us)
        if kernel.start_us > last_us:
            gaps_us.append(kernel.start_us - last_us)
        busy_us += max(0.0, kernel.end_us - max(kernel.start_us, last_us))
        last_us = max(last_us, kernel.end_us)
    return {
        "cycles": len(spans),
        "cycle_ms": (end_us - begin_us) / 1e3,
        "gaps_ms": (end_us - begin_us - busy_us) / 1e3,
        "largest_gap_us": max(gaps_us, default=0.0),
        "kernels": len(cycle),
        "kinds": [
            {"kind": kind, "kernels": len(times), "ms": sum(times) / 1e3, "mean us": sum(times) / len(times)}
            for kind, times in sorted(by_kind.items(), key=lambda item: -sum(item[1]))
        ],
    }


def profile(server: Server, args: argparse.Namespace, batch: int, folder: Path) -> dict:
    """Profile steps in the middle of a load of ``batch`` equal requests."""
    prompts = random_prompts(batch, seed=0, tokens=args.context, vocab=SHAPES[args.model]["vocab_size"])

    def load(tokens: int) -> None:
        requests = [Request(prompt=prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts]
        run_load(server.base_url, requests, concurrency=batch, description=f"batch {batch}")

    load(WARM_UP_TOKENS)
    thread = threading.Thread(target=load, args=(PROFILED_TOKENS,))
    thread.start()
    time.sleep(1.5)  # past the prefill
    server.start_profile(folder, steps=PROFILED_STEPS, activities=["GPU"])
    thread.join()
    return summarize(read_trace(next(folder.glob("*.gz"))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.cycle",
        description="Profile one SELF_QUANT cycle: kernel time by kind, and gaps. Needs a GPU.",
    )
    parser.add_argument("--model", default="7b", choices=list(SHAPES), help="default %(default)s")
    parser.add_argument("--gamma", type=int, default=3, metavar="G", help="drafted tokens a cycle; default %(default)s")
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 16], metavar="B", help="requests at once; default 1 16"
    )
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS", help="prompt length; default %(default)s")
    parser.add_argument(
        "--acceptance", type=float, default=0.9, metavar="A", help="stated acceptance; default %(default)s"
    )
    add_self_quant_config(parser)
    parser.add_argument("--out", type=Path, default=Path("cycle-results"), metavar="DIR", help="default %(default)s")
    args = parser.parse_args(argv)
    if ON_CPU:
        parser.error("needs a GPU: it profiles CUDA kernels")
    exit_on_sigterm()
    arms = [Arm(algorithm="self_quant", gamma=args.gamma)]
    flags = {
        **shared_args(max(args.batch), args.context + PROFILED_TOKENS),
        "cuda-graph-bs": sorted(args.batch),
        **server_args(arms, draft_path=None, idle_gamma=args.gamma),
    }
    record = {"environment": environment(), "settings": {**vars(args), "out": str(args.out)}, "batches": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model_path = write_model(Path(scratch), args.model)
        with Server(
            model_path,
            flags,
            env=server_env(arms, args.acceptance, args.self_quant_config),
            log_path=args.out / "server.log",
        ) as server:
            for batch in args.batch:
                summary = profile(server, args, batch, Path(scratch, f"trace-{batch}"))
                record["batches"][batch] = summary
                print(
                    f"\n{args.model}, batch {batch}, gamma {args.gamma}: cycle {summary['cycle_ms']:.2f} ms, "
                    f"gaps {summary['gaps_ms']:.2f} ms (largest {summary['largest_gap_us']:.1f} us), "
                    f"{summary['kernels']} kernels\n"
                )
                print(table(summary["kinds"]))
    write_json(args.out / "cycle.json", record)
    print(f"\nraw data: {args.out}/cycle.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
