"""Train pylm: a 7M-parameter Llama that has read Python's standard library.

    python examples/pylm/train.py --work build/pylm          # resumes from build/pylm/checkpoint.pt
    python examples/pylm/train.py --work build/pylm --export # writes the checkpoint beside this script

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, AdamW for the
embedding and the norms; warm-up, constant rate, linear decay. Sequences grow from 256 to 1,024 tokens.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pressd.compress import corpus

HERE = Path(__file__).parent
EOS = "<|endoftext|>"
TOKENS_PER_STEP = 4096
STAGES = ((256, 0.60), (512, 0.85), (1024, 1.0))  # (sequence length, until this share of the steps)
WARMUP_STEPS, DECAY_SHARE = 40, 0.35
MUON_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.05
# Half of what is read early is the library's own tests; while the rate decays most of it is the library.
LIBRARY_SHARE, LIBRARY_SHARE_IN_DECAY = 0.5, 0.8


def train_tokenizer(documents: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 4,096 entries; id 0 begins and ends every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, model_max_length=1024)


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # every block starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices; update: [matrices, rows, columns].

    Computes in bfloat16 under autocast: the iteration only has to bring singular values near one.
    """
    x = update.mT if update.size(1) > update.size(2) else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if torch.is_autocast_enabled("cpu"):
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if update.size(1) > update.size(2) else x).to(update.dtype)


class Muon:
    """Momentum whose update is orthogonalised, for groups of equally shaped matrices, in float32."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(shapes.values())
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalise(gradient.lerp(momentum, 0.95))
            rows, columns = group[0].shape
            scale = lr * math.sqrt(max(1.0, rows / columns))
            for parameter, delta in zip(group, update, strict=True):
                parameter.mul_(1 - lr * WEIGHT_DECAY).add_(delta, alpha=-scale)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate at `step`."""
    decay_start = steps * (1 - DECAY_SHARE)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 1.0 if step < decay_start else max(0.0, (steps - step) / (steps - decay_start))


class Stream:
    """Pieces of packed tokens in a random order; every piece of an epoch is read once before the next epoch begins."""

    def __init__(self, tokens: torch.Tensor, seed: int) -> None:
        self.tokens, self.seed, self.tokens_read = tokens, seed, 0

    def take(self, sequences: int, length: int) -> torch.Tensor:
        """Return [sequences, length + 1] tokens. What comes next depends on the seed and on tokens_read alone."""
        pieces = (len(self.tokens) - 1) // length
        rows = []
        for _ in range(sequences):
            epoch, position = divmod(self.tokens_read // length, pieces)
            start = int(self._order(epoch, length, pieces)[position]) * length
            rows.append(self.tokens[start : start + length + 1])
            self.tokens_read += length
        return torch.stack(rows).long()

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long-lived as the process
    def _order(self, epoch: int, length: int, pieces: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch * 1009 + length)
        return torch.randperm(pieces, generator=generator)


def pack(
    tokenizer: PreTrainedTokenizerFast, documents: tuple[str, ...], generator: torch.Generator | None
) -> torch.Tensor:
    """Return all documents as one row of tokens, shuffled when there is a generator."""
    encoded = tokenizer(list(documents), add_special_tokens=True)["input_ids"]
    order = range(len(encoded)) if generator is None else torch.randperm(len(encoded), generator=generator).tolist()
    return torch.tensor([token for index in order for token in encoded[index]], dtype=torch.int32)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokens: torch.Tensor, length: int, limit: int) -> float:
    """Mean nats per token over the first `limit` held-out tokens in sequences of `length`."""
    rows = tokens[: min(limit, len(tokens)) // length * length].view(-1, length).long()
    losses = [model(input_ids=chunk, labels=chunk, use_cache=False).loss for chunk in rows.split(4096 // length)]
    return float(torch.stack(losses).mean())


def load_data(work: Path, seed: int) -> tuple[PreTrainedTokenizerFast, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokenizer, library tokens, test-suite tokens, held-out tokens)."""
    library, tests = corpus.stdlib_training()
    if not tests:
        raise SystemExit("this Python comes without its test suite; train with one that has Lib/test")
    if (work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    else:
        tokenizer = train_tokenizer(library)
        tokenizer.save_pretrained(work)
    generator = torch.Generator().manual_seed(seed)
    heldout = pack(tokenizer, corpus.load("stdlib", "heldout").documents, None)
    return tokenizer, pack(tokenizer, library, generator), pack(tokenizer, tests, generator), heldout


class Run:
    """Everything that a checkpoint must hold for training to go on as if it had never stopped."""

    def __init__(self, library_tokens: torch.Tensor, test_tokens: torch.Tensor, seed: int) -> None:
        self.model = new_model(seed)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        self.rest = [p for p in self.model.parameters() if p.ndim == 1] + [self.model.model.embed_tokens.weight]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(self.rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.streams = {"library": Stream(library_tokens, seed), "tests": Stream(test_tokens, seed + 1)}

    def next_batch(self, length: int, library_share: float) -> torch.Tensor:
        """Return [sequences, length + 1] tokens, each sequence from the library with probability `library_share`."""
        sequences = TOKENS_PER_STEP // length
        from_library = int((torch.rand(sequences, generator=self.generator) < library_share).sum())
        counts = {"library": from_library, "tests": sequences - from_library}
        return torch.cat([self.streams[name].take(count, length) for name, count in counts.items() if count])

    def update(self, rate: float) -> None:
        """Step both optimisers at `rate` times their peak rates, and forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.muon.step(MUON_LR * rate)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LR * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)

    def save(self, path: Path, step: int) -> None:
        """Write the checkpoint; it is whole or the old one at any moment."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "momenta": self.muon.momenta,
            "generator": self.generator.get_state(),
            "tokens_read": {name: stream.tokens_read for name, stream in self.streams.items()},
        }
        partial = path.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> int:
        """Continue from the checkpoint, if there is one; return the steps already made."""
        if not path.exists():
            return 0
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self.muon.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.generator.set_state(state["generator"])
        for name, stream in self.streams.items():
            stream.tokens_read = state["tokens_read"][name]
        return int(state["step"])


def train(work: Path, steps: int, seed: int, compiled: bool, bf16: bool) -> None:
    """Train to `steps`, writing checkpoint.pt and log.jsonl to `work` every 100 steps.

    bf16: multiply in bfloat16 (parameters, moments and losses stay float32); twice the speed where the CPU has it.
    """
    work.mkdir(parents=True, exist_ok=True)
    _, library_tokens, test_tokens, heldout = load_data(work, seed)
    print(f"library {len(library_tokens):,} tokens, tests {len(test_tokens):,}, held out {len(heldout):,}", flush=True)
    run = Run(library_tokens, test_tokens, seed)
    start = run.restore(work / "checkpoint.pt")
    forward = torch.compile(run.model, dynamic=False) if compiled else run.model
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16) if bf16 else contextlib.nullcontext
    began, log = time.monotonic(), (work / "log.jsonl").open("a")
    running = 0.0
    for step in range(start, steps):
        length = next(length for length, until in STAGES if step < until * steps)
        share = LIBRARY_SHARE_IN_DECAY if step >= steps * (1 - DECAY_SHARE) else LIBRARY_SHARE
        # The fused attention pays from 1,024 tokens on; before that plain products are a sixth faster on two cores.
        run.model.set_attn_implementation("eager" if bf16 and length < 1024 else "sdpa")
        batch = run.next_batch(length, share)
        with half():
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        with half():
            run.update(learning_rate(step, steps))
        running += loss.item()
        seconds = time.monotonic() - began
        if (step + 1) % 20 == 0:
            tokens_per_s = (step + 1 - start) * TOKENS_PER_STEP / seconds
            print(f"step {step + 1}/{steps} loss {running / 20:.3f} {tokens_per_s:,.0f} tok/s", flush=True)
            running = 0.0
        if (step + 1) % 100 == 0 or step + 1 == steps:
            with half():
                nats = heldout_loss(run.model, heldout, 512, 65536 if step + 1 < steps else len(heldout))
            record = {"step": step + 1, "steps": steps, "heldout_nats": round(nats, 4), "seconds": round(seconds)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
            run.save(work / "checkpoint.pt", step + 1)


def export(work: Path, out: Path, seed: int) -> None:
    """Write the trained model in bfloat16 with its tokenizer, and print what the model card says of it."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model = new_model(seed)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).float()  # measured as it is stored: rounded to bfloat16
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer, library_tokens, test_tokens, heldout = load_data(work, seed)
    tokenizer.save_pretrained(out)
    model.float()
    facts = {
        "python": platform.python_version(),
        "steps": state["step"],
        "tokens_read": state["step"] * TOKENS_PER_STEP,
        "distinct_tokens": len(library_tokens) + len(test_tokens),
        "heldout_tokens": len(heldout),
        "heldout_nats_512": round(heldout_loss(model, heldout, 512, len(heldout)), 4),
        "heldout_nats_1024": round(heldout_loss(model, heldout, 1024, len(heldout)), 4),
        "seed": seed,
    }
    print(json.dumps(facts, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16 (for CPUs with AVX512-BF16 or AMX)")
    parser.add_argument("--export", action="store_true", help="write the model beside this script and stop")
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.work, HERE, arguments.seed)
    else:
        train(arguments.work, arguments.steps, arguments.seed, arguments.compile, arguments.bf16)


if __name__ == "__main__":
    main()
