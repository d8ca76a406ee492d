"""Our decoder as lm-eval (EleutherAI's harness) asks a model. Needs `pip install 'pressd[tasks]'`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pressd.compress.scoring import Scored, answer, score
from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.runtime.models import Decoder

# Longest answer where a task does not say: lm-eval's own number for Hugging Face's models.
_MAX_ANSWER = 256


class DecoderLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's three kinds of requests; tokens, windows and stops are those of its Hugging Face model."""

    def __init__(self, decoder: Decoder, path: Path) -> None:
        """Take the tokenizer from the model directory `path`."""
        super().__init__()
        self._decoder = decoder
        self.tokenizer: Any = load_tokenizer(path)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is taken to be: the beginning of text, or the end of one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **special))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [(found.log_likelihood, found.is_greedy) for found in self._score([r[1:] for r in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._score([pair for pairs in windows for pair in pairs]))
        return [sum(next(scored).log_likelihood for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._answer(*request.args) for request in requests]

    def _score(self, pairs: Sequence[Any]) -> list[Scored]:
        return score(self._decoder, pairs)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._decoder.config.max_context,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _answer(self, context: str, asked: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(asked, _MAX_ANSWER)
        if options.get("do_sample"):
            raise ValueError("this task draws its answers at random (do_sample); only greedy answers are compared")
        eos = self.tokenizer.decode([self.eot_token_id])
        return answer(
            self._decoder,
            self.tok_encode(context),
            int(options["max_gen_toks"]),
            lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            handle_stop_sequences(options.get("until"), eos=eos),
        )
