"""What transformers does with the same shape on the same GPU: eager, and with a static cache that it compiles.

    python tests/bench/gpu_peers.py [--seconds 60] [--out build/gpu-results]

A random Llama of 8 billion parameters in bf16. Tokens per second of decoding are from two calls of `generate` that
differ in how many tokens they make; each way runs in a process of its own, which is ended when its time is over.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}
PROMPT, FEW, MANY = 128, 4, 36
WAYS = {"eager": ("dynamic", (1, 32)), "compiled": ("static", (1,))}


def measure(way: str) -> None:
    """Print a line of JSON for each batch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    cache, batches = WAYS[way]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.generation_config.eos_token_id = None

    def seconds(ids: "torch.Tensor", tokens: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for batch in batches:
        ids = torch.randint(0, 1000, (batch, PROMPT), device="cuda")
        for tokens in (FEW, MANY):
            seconds(ids, tokens)
        steps = [(seconds(ids, MANY) - seconds(ids, FEW)) / (MANY - FEW) for _ in range(3)]
        row = {"way": way, "batch": batch, "tokens_per_s": batch / sorted(steps)[1]}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each way")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--out", type=Path, help="folder for peers.json, written after every way")
    parser.add_argument("--one", choices=tuple(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one)
        return
    rows = []
    for way in arguments.ways:
        command = [sys.executable, __file__, "--one", way]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=arguments.seconds)
            told, note = ended.stdout, ended.stderr.strip().splitlines()[-1:] if ended.returncode else []
        except subprocess.TimeoutExpired as error:
            told = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            note = [f"ended after {arguments.seconds:.0f} s"]
        rows += [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        rows += [{"way": way, "note": line} for line in note]
        print(rows[-1] if rows else way, flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "peers.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
