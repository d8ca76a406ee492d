"""Presses a model with auto-round, on given tokens: runs in a Python that has it, and nothing of ours.

    A/bin/python tests/bench/peer_autoround.py --model examples/pylm --scheme w4a16g128 \
        --tokens build/peers/calibration-0.safetensors --out build/peers/out

200 steps per block over batches of eight rows, as it does by default; the rest of its defaults are left as they are.
Saved in compressed-tensors' layout, so the Python needs compressed-tensors too.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from peer_task import Stopwatch, answer, read_task
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    task = read_task(__doc__.splitlines()[0], ("signround",))
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    stopwatch = Stopwatch()
    quantiser = AutoRound(
        model,
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group_size,
        sym=True,
        iters=200,
        batch_size=BATCH,
        seqlen=task.ids.size(1),
        nsamples=len(task.ids),
        dataset=list(torch.split(task.ids, BATCH)),
        device_map="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        quantiser.quantize_and_save(output_dir=folder, format="llm_compressor")
        spent = stopwatch.read()
        (saved,) = Path(folder).iterdir()  # under a name of its own
        shutil.move(saved, task.out)
    answer(("auto-round", "compressed-tensors"), dtype=str(quantiser.model.dtype).removeprefix("torch."), **spent)


if __name__ == "__main__":
    main()
