"""What pressing a shape costs: seconds per block and per pass, and the most memory, with a random checkpoint.

    python tests/bench/press_shape.py --layers 16 --tokens 16384 --scheme w4a16g128 --passes gptq

The checkpoint, bfloat16 and random, is made once under build/bench, a tensor at a time; the tokens are random as well,
so the result says nothing of quality. Prints one JSON object; peaks are of this process, mapped pages included.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import cpu_name, num_cores, peak_rss_bytes
from pressd.compress.press import BlockDone
from pressd.compress.recipe import recipe_of_scheme
from pressd.compress.report import read_report
from pressd.compress.weights_writer import PlannedTensor, WeightsWriter
from pressd.runtime.artifact.families import ModelMap, describe

FOLDER = Path(__file__).parents[2] / "build" / "bench"
DTYPE = torch.bfloat16


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    source = make_checkpoint(config_of(args))
    out = source.with_name(f"{source.name}-{args.scheme}")
    shutil.rmtree(out, ignore_errors=True)
    ids = torch.randint(
        0, args.vocab, (args.tokens // args.seq_len, args.seq_len), generator=torch.Generator().manual_seed(1)
    )
    rows = CalibrationRows(name="random", text_sha256="", seed=1, ids=ids)
    recipe = recipe_of_scheme(args.scheme, tuple(args.passes))
    before = peak_rss_bytes()
    compress(source, recipe, out, rows=rows, devices=args.devices, progress=tell)
    report = read_report(out)
    assert report is not None
    found = {
        "shape": vars(args),
        "torch": torch.__version__,
        "processor": cpu_name(),
        "cores": num_cores(),
        "wall_seconds": report.cost.wall_seconds,
        "blocks": {block.name: block.seconds for block in report.cost.blocks},
        "passes": report.cost.passes,
        "peak_rss_bytes": report.cost.peak_rss_bytes,
        "peak_rss_bytes_before": before,
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (
        ("layers", 16),
        ("tokens", 16384),
        ("seq-len", 512),
        ("hidden", 2048),
        ("ffn", 8192),
        ("heads", 32),
        ("kv-heads", 8),
        ("vocab", 32000),
        ("threads", torch.get_num_threads()),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scheme", default="w4a16g128")
    parser.add_argument("--passes", nargs="*", default=["gptq"])
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": max(2048, args.seq_len),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def make_checkpoint(config: dict[str, Any]) -> Path:
    """Return the directory of the checkpoint of this config; it is made if it is not there."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    path = FOLDER / "-".join(["random", *(str(config[key]) for key in (*keys, "vocab_size"))])
    text = json.dumps(config)
    if (path / "config.json").is_file() and (path / "config.json").read_text() == text:
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    planned = list(planned_tensors(describe(config)))
    generator = torch.Generator().manual_seed(0)
    with WeightsWriter(path, [[one] for one in planned], shard_bytes=1 << 30) as writer:
        for one in planned:
            writer.write(one.name, draw(one.shape, generator))
    (path / "config.json").write_text(text)  # last: a checkpoint that is not whole is made again
    return path


def planned_tensors(model: ModelMap) -> Iterator[PlannedTensor]:
    for linear in model.linears():
        yield PlannedTensor(name=f"{linear.prefix}.weight", dtype=DTYPE, shape=linear.shape)
    for name, shape in model.others().items():
        yield PlannedTensor(name=name, dtype=DTYPE, shape=shape)


def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the size of their inputs; gains around one."""
    if len(shape) == 1:
        return torch.rand(shape, generator=generator).add_(0.5).to(DTYPE)
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(DTYPE)


def tell(block: BlockDone) -> None:
    sys.stderr.write(f"{block.block}: {block.seconds:.1f} s, peak {peak_rss_bytes() / 2**20:.0f} MiB\n")


if __name__ == "__main__":
    main()
