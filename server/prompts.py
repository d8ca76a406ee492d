"""Prompts as the engine takes them, and the way back to text; slow work on text goes to the door's thread."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pressd.runtime.params import MAX_BAD_WORD_TOKENS
from pressd.runtime.report import EngineInfo
from pressd.server.asked import Asked, TextPrompt, TokenPrompt
from pressd.server.chat import ChatPrompt
from pressd.server.chat_template import ChatError, LongChatError, UnusedFieldError
from pressd.server.errors import invalid, unsupported
from pressd.server.model_card import ModelCard
from pressd.server.text import Encoding, Text

T = TypeVar("T")
# Bytes of a text that need not fit the context: it is only counted, or cut. About a second of a thread.
MAX_TEXT = 1 << 20


class Desk(Protocol):
    """What is asked of the door."""

    def require_ready(self) -> tuple[EngineInfo, ModelCard]: ...
    def require_text(self, field: str) -> Text: ...
    async def in_thread(self, function: Callable[[], T]) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A prompt's tokens, and its text if that begins the answer."""

    ids: tuple[int, ...]
    echo: str | None = None


async def prompt_of(desk: Desk, asked: Asked) -> Prepared:
    """Tokenise what was asked; raises Refusal."""
    if isinstance(asked.prompt, TokenPrompt):
        ids, said = asked.prompt.ids, None
    else:
        bounded = asked.max_prompt_tokens is None
        encoding = await encode(desk, asked.prompt, bounded=bounded)
        ids, said = encoding.ids, encoding.text
    if asked.max_prompt_tokens is not None and len(ids) > asked.max_prompt_tokens:
        ids, said = ids[-asked.max_prompt_tokens :], None
    if not asked.output.echo:
        return Prepared(ids=ids)
    if said is None:
        text = desk.require_text("output.echo_prompt")
        skip, kept = asked.output.skip_special_tokens, ids
        said = await desk.in_thread(lambda: text.decode(kept, skip_special_tokens=skip))
    return Prepared(ids=ids, echo=said)


async def encode(
    desk: Desk,
    prompt: TextPrompt | ChatPrompt,
    *,
    add_special_tokens: bool = True,
    bounded: bool = True,
    spans: bool = False,
) -> Encoding:
    """Tokenise a text, or a conversation by the model's template; raises Refusal.

    `bounded` refuses a text which no tokens of the model could bring into its context, before any work is done;
    otherwise a text may have as many bytes, or MAX_TEXT if that is more.
    """
    text = desk.require_text(prompt.field)
    info, _ = desk.require_ready()
    most = text.max_bytes(info.max_context)
    if isinstance(prompt, TextPrompt):
        _check_length(prompt, most, bounded=bounded)
        return await desk.in_thread(
            lambda: text.encode(prompt.text, add_special_tokens=add_special_tokens, spans=spans)
        )
    try:
        most_rendered = most if bounded else max(most, MAX_TEXT)
        return await desk.in_thread(lambda: text.encode_chat(prompt, max_bytes=most_rendered, spans=spans))
    except UnusedFieldError as error:
        raise unsupported(f"{error.field}: {error}", error.field) from None
    except LongChatError as error:
        raise invalid(prompt.field, str(error), reason="PROMPT_TOO_LONG") from None
    except ChatError as error:
        raise invalid(prompt.field, str(error)) from None


async def bad_words_of(desk: Desk, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word, as it is written inside a text and at the beginning of a word; raises Refusal."""
    if not words:
        return ()
    text = desk.require_text("sampling.bad_words")

    def spell() -> tuple[tuple[int, ...], ...]:
        spellings: dict[tuple[int, ...], None] = {}
        for index, word in enumerate(words):
            for ids in map(text.encode_inside, (word, f" {word.lstrip()}")):
                if len(ids) > MAX_BAD_WORD_TOKENS:
                    problem = f"it has {len(ids)} tokens; at most {MAX_BAD_WORD_TOKENS} are taken"
                    raise invalid(f"sampling.bad_words[{index}]", problem)
                if ids:
                    spellings[ids] = None
        return tuple(spellings)

    return await desk.in_thread(spell)


def bytes_of_token(asked: Asked, text: Text | None) -> Mapping[int, bytes] | None:
    """Return what a request's tokens are written with, None if nobody reads text; raises Refusal for want of it."""
    if not asked.output.text and not asked.stop:
        return None
    if text is None:
        field = "output.text" if asked.output.text else "stopping.stop"
        raise invalid(field, "this model has no tokenizer; send token_ids, and set output.text to false")
    return text.bytes_of_token if asked.output.skip_special_tokens else text.bytes_of_any_token


def _check_length(prompt: TextPrompt, most: int, *, bounded: bool) -> None:
    num_bytes = len(prompt.text.encode())
    if bounded and num_bytes > most:
        problem = f"it has {num_bytes} bytes; whatever its tokens, more than {most} do not fit the context"
        raise invalid(prompt.field, problem, reason="PROMPT_TOO_LONG")
    if num_bytes > max(most, MAX_TEXT):
        problem = f"it has {num_bytes} bytes; at most {max(most, MAX_TEXT)} are tokenised"
        raise invalid(prompt.field, problem, reason="PROMPT_TOO_LONG")
