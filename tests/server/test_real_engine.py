"""The whole way: a model directory, `pressd serve` as users start it, gRPC, against transformers' own answer."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pressd.v1 import generate_pb2, model_pb2

pytestmark = pytest.mark.system

PROMPTS = ["the theory", "lo and behold", "ü 漢字 €", "0123456789" * 7]
NEW_TOKENS = 40
NUM_LAYERS = 2
PYLM = Path(__file__).parents[2] / "examples" / "pylm"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_of: Callable[[Path], int]) -> Path:
    """Directory of a random Llama in float32 that speaks bytes, and so broken text as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=tokenizer_of(folder) + 10,  # more than the tokenizer knows, as padded vocabularies have
        hidden_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.2,  # logits spread over several nats: no two tokens are nearly equally likely
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(llama: Path) -> list[tuple[list[int], str]]:
    """transformers' greedy answer to each prompt: new ids without the end of sequence, and their text."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        new = made[0, ids.shape[1] :].tolist()
        new = new[: new.index(0)] if 0 in new else new
        found.append((new, tokenizer.decode(new, skip_special_tokens=True)))
    return found


@pytest.fixture(scope="module")
def server(llama: Path, server_of: Callable[..., Any]) -> Iterator[Any]:
    yield from server_of(llama, "--device", "cpu", "--max-batch", "3", "--kv-memory", "4MiB", scripted=False)


def test_greedy_text_is_that_of_transformers(server: Any, answers: list[tuple[list[int], str]]) -> None:
    with server.client() as client:
        for prompt, (ids, text) in zip(PROMPTS, answers, strict=True):
            completion = client.generate(prompt, temperature=0, max_new_tokens=NEW_TOKENS, token_ids=True).completions[
                0
            ]
            assert [token.id for token in completion.tokens] == ids
            assert completion.text == text


def test_the_example_model_says_what_transformers_says(server_of: Callable[..., Any]) -> None:
    """Greedy text of the dense model over gRPC, both sides in float32; some answers end by themselves, some do not."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    prompts = ["def main():\n", "import ", "class Node:\n    def __init__(self", "# Copyright"]
    model, tokenizer = LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.float32), AutoTokenizer.from_pretrained(PYLM)
    for server in server_of(PYLM, "--device", "cpu", "--dtype", "float32", scripted=False):
        with server.client() as client:
            for prompt in prompts:
                ids = torch.tensor([tokenizer(prompt)["input_ids"]])
                with torch.inference_mode():
                    made = model.generate(
                        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, pad_token_id=0
                    )
                expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
                text = client.generate(prompt, temperature=0, max_new_tokens=48).completions[0].text
                assert text == expected


def test_neighbours_in_the_batch_change_nothing(server: Any, answers: list[tuple[list[int], str]]) -> None:
    with server.client() as client, ThreadPoolExecutor(8) as pool:

        def ask(prompt: str) -> str:
            events = client.stream(prompt, temperature=0, max_new_tokens=NEW_TOKENS)
            return "".join(event.delta.text for event in events)

        assert list(pool.map(ask, PROMPTS * 4)) == [text for _, text in answers] * 4


def test_what_was_computed_is_freed_and_counted(server: Any) -> None:
    server.await_metric(0, "pressd_requests_running")
    before = server.metric("pressd_generated_tokens_total")
    with server.client() as client:
        stream = client.stream("the", ignore_eos=True, request_id="freed", max_new_tokens=200)
        next(stream)
        stream.close()
        usage = client.generate("the", ignore_eos=True, max_new_tokens=9).completions[0].finished.usage
    assert usage.completion_tokens == 9
    server.await_metric(0, "pressd_kv_cache_blocks", state="used")
    assert server.metric("pressd_generated_tokens_total") >= before + 9


def test_keys_and_values_in_eight_bits_are_told_and_counted(llama: Path, server_of: Callable[..., Any]) -> None:
    options = ("--device", "cpu", "--kv-dtype", "int8", "--kv-memory", "4MiB")
    for server in server_of(llama, *options, scripted=False):
        with server.client() as client:
            memory = client.model().memory
            text = client.generate(PROMPTS[0], temperature=0, max_new_tokens=8).completions[0].text
        assert text
        # 2 layers x 2 (K and V) x 2 heads x (16 codes and a scale of 4 bytes) x 16 tokens are a block.
        assert (memory.dtype, memory.kv_dtype, memory.kv_blocks) == ("float32", "int8", (4 << 20) // 2560)
        assert memory.kv_bytes == memory.kv_blocks * 2560
        assert server.metric("pressd_kv_cache_capacity_bytes", dtype="int8") == memory.kv_bytes


def test_same_seed_same_text(server: Any) -> None:
    with server.client() as client:
        asked: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 20, "ignore_eos": True}
        first, second = (client.generate("the", seed=3, **asked).completions[0].text for _ in range(2))
        others = {client.generate("the", **asked).completions[0].text for _ in range(3)}
    assert first == second
    assert len(others) > 1


def test_context_ends_it(server: Any) -> None:
    with server.client() as client:
        assert client.model().limits.max_context == 256
        finished = client.generate([5] * 250, ignore_eos=True).completions[0].finished
    assert finished.reason == generate_pb2.FINISH_REASON_CONTEXT_LIMIT
    assert finished.usage.completion_tokens == 6


def test_model_tells_how_it_is_computed(server: Any) -> None:
    with server.client() as client:
        model = client.model()
    assert (model.name, model.architecture, model.memory.dtype) == ("llama", "LlamaForCausalLM", "float32")
    assert {kernel.op for kernel in model.compression.kernels} >= {"linear", "attention"}
    assert list(model.compression.methods) == []
    assert model.default_sampling.temperature == 0  # nothing in the directory asks to sample


def test_pressed_model_tells_what_was_done_to_it(
    llama: Path, tmp_path: Path, serve: Callable[..., Any], answers: list[tuple[list[int], str]]
) -> None:
    pressed = tmp_path / "pressed"
    command = [sys.executable, "-m", "pressd.server.cli", "compress", str(llama), "-o", str(pressed), "-s", "w8a16"]
    command += ["--pass", "rtn"]  # which `methods` below names
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    manifest = pressed / "pressd/manifest.json"
    measured = {"kl_mean": 0.25, "top1_agreement": 0.75, "data": {"name": "stdlib"}}  # as `pressd eval` leaves it
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"quality": measured}))
    server = serve(pressed, "--device", "cpu", "--kv-memory", "4MiB", scripted=False).await_ready()
    with server.client() as client:
        model = client.model()
        text = client.generate(PROMPTS[0], max_new_tokens=8).completions[0].text
    (method,) = model.compression.methods
    assert (method.kind, method.name) == (model_pb2.COMPRESSION_KIND_QUANTIZATION, "rtn")
    assert (method.bits, method.activation_bits, method.HasField("group_size")) == (8, 16, False)
    assert 0 < model.compression.artifact_bytes < model.compression.dense_bytes
    assert 8 <= model.compression.bits_per_weight < 16
    assert {plan.scheme for plan in model.compression.layers} >= {"w8a16"}
    assert dict(model.compression.quality) == {"kl_mean": 0.25, "top1_agreement": 0.75}
    assert server.metric("pressd_fidelity_kl_mean", source="artifact") == 0.25
    assert server.metric("pressd_fidelity_top1_agreement", source="artifact") == 0.75
    assert model.memory.weights_bytes < model.memory.dense_bytes
    assert server.metric("pressd_model_weights_bytes", format="w8a16") == model.memory.weights_bytes
    assert server.metric("pressd_model_info", bits="8", artifact_sha=model.version) == 1
    assert text
    assert server.stop() == 0


def test_unfinished_artifact_is_refused_in_one_line(llama: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for file in llama.iterdir():
        (unfinished / file.name).symlink_to(file)
    (unfinished / "pressd").mkdir()
    command = [
        sys.executable,
        "-m",
        "pressd.server.cli",
        "serve",
        str(unfinished),
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert ended.returncode == 1
    assert len(told) == 1
    assert told[0].startswith(f"pressd serve: {unfinished} is unfinished")
