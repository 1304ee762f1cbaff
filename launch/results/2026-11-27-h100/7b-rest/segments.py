"""Segments of the median cycle of a trace, by kernels that begin and end them: python segments.py FOLDER NAME BATCH..."""

import gzip
import json
import sys

folder, name = sys.argv[1:3]
for b in map(int, sys.argv[3:]):
    d = json.load(gzip.open(f"{folder}/{name}-{b}.json.gz", "rt"))
    K = [(t, u, d["names"][n], c) for t, u, n, _, s, c in d["kernels"]]
    ends = [t + u for t, u, n, _ in K if "_emit_kernel" in n]
    spans = sorted(zip(ends, ends[1:]), key=lambda s: s[1] - s[0])
    b0, e0 = spans[len(spans) // 2]
    K = [k for k in K if b0 <= k[0] < e0]
    launches = {c for t, u, n, c in d["host"] if "GraphLaunch" in n}
    chain0 = min(k[0] for k in K if k[3] in launches)
    graphs = sorted({k[3] for k in K if k[3] in launches}, key=lambda c: min(k[0] for k in K if k[3] == c))
    c1 = max(k[0] + k[1] for k in K if k[3] == graphs[0])
    v0 = min(k[0] for k in K if k[3] == graphs[1])
    v1 = max(k[0] + k[1] for k in K if k[3] == graphs[1])

    def at(s):
        return next(k for k in K if s in k[2] and k[3] not in launches)

    sums, scores = at("_sums_kernel"), at("_scores_kernel")
    h2d = next(k for k in K if "HtoD" in k[2] and k[0] > scores[0])
    mta = at("multi_tensor_apply")
    assign = at("assign_req_to_token_pool")
    resolved = [k for k in K if k[0] > assign[0] and "index_elementwise" in k[2] and k[3] not in launches][:2][-1]
    marks = [
        ("end of cycle to scores (lengths, publish, queries)", b0, sums[0]),
        ("scores: sums, log_sums, scores", sums[0], scores[0] + scores[1]),
        ("choice: mask, pages, topk, sort, tokens (and a write of SGLang)", scores[0] + scores[1], h2d[0]),
        ("SGLang: reserve slots, read relay", h2d[0], resolved[0] + resolved[1]),
    ]

    ours_end = next((k for k in reversed(K) if k[0] < mta[0]))
    marks += [
        ("step, chain inputs, window, verify layout", resolved[0] + resolved[1], mta[0]),
        ("SGLang: verify's inputs and FA metadata", mta[0], chain0),
        ("draft chain graph", chain0, c1),
        ("tokens into the verify", c1, v0),
        ("verify graph", v0, v1),
        ("judge", v1, e0),
    ]
    print(f"== {name} batch {b}: cycle {e0 - b0:.1f}, rest {e0 - b0 - (c1 - chain0):.1f}")
    for label, s, e in marks:
        inside = [k for k in K if s <= k[0] < e - 1e-6]
        busy = sum(k[1] for k in inside)
        print(f"{e - s:9.1f} us  {len(inside):4d} kernels  busy {busy:9.1f}  gaps {e - s - busy:7.1f}  {label}")
    print("   judge:", [(k[2][:20], round(k[1], 1)) for k in K if k[0] >= v1 and k[0] < e0])
