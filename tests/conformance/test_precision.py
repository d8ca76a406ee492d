"""Fast paths lose no more than bfloat16 itself does: KL divergence to the reference of the same scheme, in float32.

With 16-bit activations what bfloat16 loses is what transformers' own forward does. Activations in int8 make every
forward jump: a difference in the last bit moves a code by a whole step now and then, and from there on all that
follows. Two float32 forwards of w8a8 that differ in the order of their sums are 1.3 times as far apart as transformers'
bfloat16 is from its float32. There, the reference kernels in bfloat16 tell what bfloat16 costs the scheme.
"""

from pathlib import Path

import pytest
import torch

from pressd.compress import compress
from pressd.compress.corpus import load
from pressd.compress.fidelity import compare
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.registry import Preference
from pressd.runtime.models import load_decoder

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
ROWS, LENGTH = 16, 256
SCHEMES = ("w4a8g128", "w4a8g32", "w8a8", "w4a16g128", "w8a16", "bf16")
# What bfloat16 loses is a mean over some thousands of tokens: this is how far two such means may differ by chance.
SLACK = 1.1
# Of 4,080 tokens, ten that are preferred by a hair.
CHANCE = 10 / (ROWS * (LENGTH - 1))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Held-out text as the example model reads it, int64 [ROWS, LENGTH]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PYLM)
    ids: list[int] = []
    for document in load("stdlib", "heldout").documents:
        ids += tokenizer(document)["input_ids"]
        if len(ids) >= ROWS * LENGTH:
            break
    return torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)


def difference(expected: torch.Tensor, found: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Return the mean KL divergence and how often both prefer the same token."""
    tokens = compare(expected[:, :-1].flatten(0, 1).float(), found[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
    return float(tokens.kl.mean()), float(tokens.agrees.mean())


@pytest.fixture(scope="module")
def bfloat16_alone(rows: torch.Tensor) -> tuple[float, float]:
    """What transformers' own forward loses in bfloat16."""
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        wide, narrow = (
            LlamaForCausalLM.from_pretrained(PYLM, dtype=dtype).eval()(rows).logits
            for dtype in (torch.float32, torch.bfloat16)
        )
    return difference(wide, narrow, rows)


@pytest.fixture(scope="module")
def source_logits(rows: torch.Tensor) -> torch.Tensor:
    """What the source says in float32."""
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        logits: torch.Tensor = LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval()(rows).logits
    return logits


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_the_fast_path_is_as_good_as_bfloat16(
    scheme: str,
    rows: torch.Tensor,
    bfloat16_alone: tuple[float, float],
    source_logits: torch.Tensor,
    tmp_path: Path,
) -> None:
    compress(PYLM, scheme, tmp_path / "pressed")
    checkpoint = Checkpoint.open(tmp_path / "pressed")

    def logits(dtype: torch.dtype, prefer: Preference) -> torch.Tensor:
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), dtype=dtype, prefer=prefer)
        return decoder.full_logits(rows)

    reference = logits(torch.float32, "reference")
    fast = logits(torch.bfloat16, "fast")
    kl, top1 = difference(reference, fast, rows)
    allowed_kl, allowed_top1 = bfloat16_alone
    if "a8" in scheme:
        allowed_kl, allowed_top1 = difference(reference, logits(torch.bfloat16, "reference"), rows)
    assert kl <= SLACK * allowed_kl
    assert top1 >= allowed_top1 - CHANCE
    # Nor is it further from the source than the scheme and bfloat16 together.
    assert difference(source_logits, fast, rows)[0] <= SLACK * (
        difference(source_logits, reference, rows)[0] + bfloat16_alone[0]
    )
