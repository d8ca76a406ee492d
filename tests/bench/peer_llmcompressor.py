"""Presses a model with llm-compressor, on given tokens: runs in a Python that has it, and nothing of ours.

    L/bin/python tests/bench/peer_llmcompressor.py --model examples/pylm --scheme w4a16g128 \
        --tokens build/peers/calibration-0.safetensors --out build/peers/out

Its GPTQ with what it defaults to: damping 0.01, blocks of 128 columns, columns in the order of their activations with
groups where they were (`static`), one sequence at a time, the model in the precision of its checkpoint.
"""

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from peer_task import Stopwatch, answer, read_task
from transformers import AutoModelForCausalLM


def main() -> None:
    task = read_task(__doc__.splitlines()[0], ("gptq", "rtn"))
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    weights = {"num_bits": task.bits, "type": "int", "symmetric": True, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": task.group_size}}}
    kind = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[task.method]
    data = None
    if task.method == "gptq":
        ids = task.ids.tolist()
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    stopwatch = Stopwatch()
    oneshot(
        model=model,
        dataset=data,
        recipe=[kind(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=task.ids.size(1),
        num_calibration_samples=len(task.ids),
        shuffle_calibration_samples=False,
    )
    spent = stopwatch.read()
    model.save_pretrained(task.out, save_compressed=True)
    answer(("llmcompressor", "compressed-tensors"), dtype=str(model.dtype).removeprefix("torch."), **spent)


if __name__ == "__main__":
    main()
