"""Memory does not grow with the number of layers: blocks come and go, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.system

SHALLOW, DEEP = 8, 32
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
BLOCK_BYTES = 2 * (4 * 256 * 256 + 3 * 256 * 1024)
RECIPE = '{passes}[scheme]\n"*" = "w4a16g128"\n'
GPTQ = '[[pass]]\nuse = "gptq"\nsweeps = 0\nclip = false\n'

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import peak_rss_bytes
from pressd.compress.recipe import parse_recipe
ids = torch.randint(0, 512, (4, 128), generator=torch.Generator().manual_seed(1))
rows = CalibrationRows(name="random", text_sha256="", seed=1, ids=ids)
compress(sys.argv[1], parse_recipe(sys.argv[2], "test"), sys.argv[3], rows=rows, shard_bytes=4 << 20)
print(peak_rss_bytes())
"""


def make(path: Path, num_layers: int) -> Path:
    path.mkdir()
    generator = torch.Generator().manual_seed(num_layers)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(512, 256), "lm_head.weight": draw(512, 256)}
    tensors["model.norm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": draw(256, 256) for name in "qkvo"}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": draw(1024, 256) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = draw(256, 1024)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(256, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": num_layers}))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("deep")
    return {layers: make(folder / str(layers), layers) for layers in (SHALLOW, DEEP)}


@pytest.mark.parametrize("passes", ["", pytest.param(GPTQ, marks=pytest.mark.slow)], ids=["rtn", "gptq"])
def test_memory_is_that_of_a_block_however_many_there_are(
    sources: dict[int, Path], passes: str, tmp_path: Path
) -> None:
    peaks = {}
    for layers, source in sources.items():
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            str(source),
            RECIPE.format(passes=passes),
            str(tmp_path / str(layers)),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        peaks[layers] = int(done.stdout)
    # Were one block in three kept, mapped or in memory, it would show. What may grow is what is told of each block, and
    # the allocator's gaps: of some pages for every one of the hundreds of tensors that come and go.
    assert peaks[DEEP] - peaks[SHALLOW] < (DEEP - SHALLOW) * BLOCK_BYTES / 3
