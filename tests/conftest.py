"""What every test stands on: poisoned memory, two threads, no network, and tiny models made from a seed."""

import os
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Read by huggingface_hub and transformers when they are imported, and inherited by the processes that tests start.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Read by OpenMP when torch is imported: threads that spin while they wait take processors from all other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = 2
LEFT_OUT = {"slow": "pytest -m slow", "gpu": "pytest -m gpu, on a machine with an NVIDIA GPU"}
EOS = "<|endoftext|>"

_deselected: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    # Determinism only warns here (see poisoned_memory); its warnings are about speed and repeatability, not faults.
    config.addinivalue_line("filterwarnings", "ignore:.*[Dd]eterministic:UserWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _deselected.update(marker for item in items for marker in LEFT_OUT if item.get_closest_marker(marker))


def pytest_sessionfinish(session: pytest.Session) -> None:
    told = getattr(session.config, "workeroutput", None)  # of one of several processes; each collects all tests
    if told is not None:
        told["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _deselected.update(Counter(getattr(node, "workeroutput", {}).get("deselected", {})) - _deselected)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, command in LEFT_OUT.items():
        if _deselected[marker]:
            terminalreporter.write_line(f"left out: {_deselected[marker]} {marker} (run with {command})")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every tensor that torch leaves uninitialised with NaN or the largest integer, so that reading one shows.

    torch does it itself, for outputs of its own operators too, as part of its deterministic mode. A test that imports
    torch in its body is covered from the next test on: this fixture does not import it for tests that need none.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(THREADS)
    yield
    if torch is not None:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama in float32 with its own lm_head and a tokenizer of single characters."""
    return _save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama", tied=False)


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its embedding as lm_head; the checkpoint holds no lm_head.weight."""
    return _save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama_tied", tied=True)


def _save_tiny_llama(path: Path, *, tied: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        # Ten times the usual, so that logits spread over several nats and a wrong weight changes the argmax.
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm whose weight is not applied
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    _save_character_tokenizer(path)
    return path


def _save_character_tokenizer(path: Path) -> None:
    """97 entries: the end of text (id 0, which also begins a prompt), newline and the printable ASCII characters."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    printable = [character for character in string.printable if character.isprintable()]
    vocabulary = {token: index for index, token in enumerate([EOS, "\n", *printable])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS).save_pretrained(path)
