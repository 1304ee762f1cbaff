"""What a result needs to be believed: environment, table, raw data."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("er_sglang", "sglang", "sglang-kernel", "torch", "triton", "flashinfer-python", "transformers")


def environment() -> dict:
    """Hardware, versions, command, commit and time of this run."""
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: metadata.version(name) for name in PACKAGES if name in installed},
        },
    }


def _hardware() -> dict:
    cpu = {"cpu": _cpu_name(), "cpu_cores": len(os.sched_getaffinity(0))}
    if not torch.cuda.is_available():
        return cpu
    gpu = torch.cuda.get_device_properties(0)
    return {**cpu, "gpu": gpu.name, "gpus": torch.cuda.device_count(), "gpu_memory_bytes": gpu.total_memory}


def _cpu_name() -> str:
    models = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" if it has changes; None outside of one."""
    describe = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with equal keys as an aligned Markdown table; floats with three significant digits, None as a dash."""
    header = list(rows[0])
    cells = [header, *([_cell(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.rjust(width) for text, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_rows(out: Path, rows: Sequence[Mapping[str, object]], **more: object) -> None:
    """A benchmark's table, in the folder `out` and on the screen, and its raw data, with `more`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"environment": environment(), **more, "rows": rows})
    text = table(rows)
    (out / "table.md").write_text(text + "\n")
    print(f"{text}\n\nRaw data: {out}/")


def write_json(path: Path, content: object) -> None:
    """Write `content`, in which dataclasses may occur."""
    path.write_text(json.dumps(content, indent=1, default=dataclasses.asdict) + "\n")
