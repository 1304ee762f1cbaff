"""Baseline of a cycle's rest: step times by calibration, speed of served steps, traces of cycles and plain steps.

python3 rest.py --out DIR --name NAME [--model 7b] [--batch 8 16]
"""

import argparse
import gzip
import hashlib
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

from er_sglang.bench.arms import Arm, server_args, server_env, shared_args
from er_sglang.bench.load import random_prompts
from er_sglang.bench.shapes import SHAPES, write_model
from er_sglang.config import CONFIG_ENV
from er_sglang.tools.serving import Server, exit_on_sigterm

GAMMA, CONTEXT, TOKENS = 5, 1024, 700
CYCLE_END = "_emit_kernel"


def kernels(path):
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [
        (
            e["ts"],
            e["dur"],
            e["name"],
            e.get("cat"),
            e["args"].get("graph id", e["args"].get("graph node id")),
            e["args"].get("stream"),
            e["args"].get("correlation"),
        )
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    host = [
        (e["ts"], e["dur"], e["name"], e.get("args", {}).get("correlation"))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("cuda_runtime", "cuda_driver")
    ]
    return sorted(found), host, events


def dump(path, out, mark):
    """All kernels from the third last mark to the last, graph kernels collapsed by correlation."""
    found, host, _ = kernels(path)
    name_of = {h[3]: (h[0], h[1], h[2]) for h in host}
    names = sorted({f[2] for f in found})
    index = {n: i for i, n in enumerate(names)}
    with gzip.open(str(out).replace(".jsonl.gz", "-raw.json.gz"), "wt") as file:
        json.dump(
            {
                "names": names,
                "kernels": [
                    (round(f[0] - found[0][0], 3), round(f[1], 3), index[f[2]], f[4], f[5], f[6]) for f in found
                ],
                "host": [(round(h[0] - found[0][0], 3), h[1], h[2], h[3]) for h in host],
            },
            file,
        )
    rows, last_end = [], None
    for ts, dur, name, cat, graph, stream, corr in found:
        launched = name_of.get(corr)
        is_graph = bool(launched and "GraphLaunch" in launched[2])
        gap = 0.0 if last_end is None else ts - last_end
        if is_graph and rows and rows[-1].get("graph") == corr:
            row = rows[-1]
            row["n"] += 1
            row["end"] = max(row["end"], ts + dur)
            row["busy"] += dur
            row["last"] = name[:60]
        else:
            rows.append(
                {
                    "graph": corr if is_graph else None,
                    "n": 1,
                    "ts": ts,
                    "end": ts + dur,
                    "busy": dur,
                    "name": name[:110],
                    "last": "",
                    "gap": round(gap, 2),
                    "stream": stream,
                    "launched": launched[0] if launched else None,
                    "cat": cat,
                }
            )
        last_end = max(last_end or 0, ts + dur)
    with gzip.open(out, "wt") as file:
        origin = found[0][0]
        for row in rows:
            row["ts"] = round(row["ts"] - origin, 2)
            row["dur"] = round(row.pop("end") - origin - row["ts"], 2)
            row["busy"] = round(row["busy"], 2)
            if row["launched"]:
                row["launched"] = round(row["launched"] - origin, 2)
            file.write(json.dumps(row) + "\n")
    return len(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="7b")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--calibration", type=float, default=8.0)
    parser.add_argument("--no-cpu", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    arms = [
        Arm(algorithm="auto", gamma=GAMMA),
        Arm(algorithm="self_quant", gamma=GAMMA),
        Arm(algorithm="self_quant", gamma=0),
    ]
    flags = {
        **shared_args(max(args.batch), CONTEXT + 2 * TOKENS),
        "cuda-graph-bs": sorted(args.batch),
        **server_args(arms, draft_path=None, idle_gamma=GAMMA),
    }
    config = {"drafter": {"attention_window": 256}, "calibration_s": args.calibration}
    env = server_env(arms, 0.93, config)
    settings = json.loads(env[CONFIG_ENV])
    settings["policy"] = {"mode": "auto", "ladder": [GAMMA]}
    env[CONFIG_ENV] = json.dumps(settings)
    result, digests = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        with Server(
            write_model(Path(scratch), args.model), flags, env=env, log_path=args.out / f"{args.name}-server.log"
        ) as server:
            print("started", round(server.start_s, 1), flush=True)
            if path := server.self_quant()["profile"]:
                shutil.copy(path, args.out / f"{args.name}-profile.json")
            for batch in args.batch:
                prompts = [
                    list(p)
                    for p in random_prompts(batch, seed=0, tokens=CONTEXT, vocab=SHAPES[args.model]["vocab_size"])
                ]

                def generate(tokens):
                    begin = time.perf_counter()
                    answer = server.generate(
                        {
                            "input_ids": prompts,
                            "sampling_params": {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True},
                        }
                    )
                    digests.append(
                        hashlib.sha256(json.dumps([a["output_ids"] for a in answer]).encode()).hexdigest()[:12]
                    )
                    return time.perf_counter() - begin, sum(
                        a["meta_info"].get("spec_verify_ct", 0) for a in answer
                    ) / batch

                for arm in arms[1:]:
                    server.change_self_quant(arm.settings(0.93, None))
                    generate(32)
                    times = []
                    for _ in range(args.repeats):
                        (short, n), (long, m) = generate(40), generate(40 + (TOKENS // 3 if not arm.drafts else TOKENS))
                        steps = m - n if arm.drafts else TOKENS // 3
                        times.append(round(1e3 * (long - short) / steps, 4))
                    result[f"{batch} {arm}"] = times
                    print(batch, arm, "ms a step", times, flush=True)
                    for activities in (["GPU"], ["CPU", "GPU"])[: 1 if args.no_cpu else 2]:
                        folder = Path(scratch, f"{batch}-{arm.gamma}-{len(activities)}")
                        folder.mkdir()
                        thread = threading.Thread(target=generate, args=(TOKENS if arm.drafts else TOKENS // 2,))
                        thread.start()
                        time.sleep(1.0 if batch == 16 else 0.8)
                        server.start_profile(folder, steps=8 if len(activities) == 1 else 4, activities=activities)
                        thread.join()
                        for _ in range(40):
                            if files := list(folder.glob("*.gz")):
                                break
                            time.sleep(0.5)
                        time.sleep(0.3)
                        out = (
                            args.out
                            / f"{args.name}-{batch}-{arm.gamma}-{'gpu' if len(activities) == 1 else 'cpu'}.jsonl.gz"
                        )
                        if len(activities) == 1:
                            print(dump(files[0], out, CYCLE_END), "rows", flush=True)
                        else:
                            _, _, events = kernels(files[0])
                            keep = [
                                {k: e[k] for k in ("ts", "dur", "name", "cat", "tid")}
                                | {
                                    "a": {
                                        k: v
                                        for k, v in e.get("args", {}).items()
                                        if k
                                        in (
                                            "correlation",
                                            "External id",
                                            "stream",
                                            "Input Dims",
                                            "Input type",
                                            "grid",
                                            "block",
                                        )
                                    }
                                }
                                for e in events
                                if e.get("ph") == "X"
                                and e.get("cat")
                                in (
                                    "kernel",
                                    "gpu_memcpy",
                                    "gpu_memset",
                                    "cuda_runtime",
                                    "cuda_driver",
                                    "cpu_op",
                                    "user_annotation",
                                )
                            ]
                            for e in keep:
                                e["name"] = e["name"][:90]
                            graph = {e["a"].get("correlation") for e in keep if "GraphLaunch" in e["name"]}
                            last, slim = None, []
                            for e in sorted(keep, key=lambda e: e["ts"]):  # of a graph's kernels the first and the last
                                if (
                                    e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")
                                    and e["a"].get("correlation") in graph
                                ):
                                    if last is e["a"]["correlation"] or (
                                        slim and slim[-1].get("g") == e["a"]["correlation"]
                                    ):
                                        slim[-1]["end"] = e["ts"] + e["dur"]
                                        continue
                                    e["g"] = e["a"]["correlation"]
                                slim.append(e)
                            with gzip.open(out, "wt") as file:
                                json.dump(slim, file)
    print("hashes", *digests)
    result["hashes"] = digests
    (args.out / f"{args.name}-times.json").write_text(json.dumps(result))


main()
