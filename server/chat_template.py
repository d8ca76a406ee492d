"""A model's chat template: what it reads of a conversation, and how a conversation is handed to it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from pressd.server.chat import ChatPrompt, Message, Tool, ToolCall
from pressd.server.chat_probe import hidden_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names that templates know an assistant's thoughts by.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class ChatError(ValueError):
    """The conversation does not fit the model's chat template, or there is none; one line for the caller."""


class UnusedFieldError(ChatError):
    """The model's chat template shows nothing of the kind; `field` is where it stands in the request."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"the model's chat template has no place for {what}; leave it out")
        self.field = field


class LongChatError(ChatError):
    """The conversation is too long, whatever its tokens."""


class ChatTemplate:
    """Renders with transformers, in its sandbox. What a template does not show is refused, with two exceptions.

    A template may drop thoughts of earlier turns, if it shows any at all: models are trained so. And it may tell calls
    of tools apart by their order instead of their ids, if the answers stand in that order.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Raises ChatError if there is no template."""
        if not tokenizer.chat_template:
            raise ChatError("this model has no chat template; send a prompt")
        self._tokenizer = tokenizer

    def render(self, prompt: ChatPrompt) -> str:
        """Return the conversation as text; raises ChatError."""
        try:
            reads = reads_of(self._tokenizer.get_chat_template(None, [] if prompt.tools else None))
            _require_read(prompt, reads)
            for hidden in hidden_names(prompt, lambda probe: self._render(probe, reads)):
                raise UnusedFieldError(hidden.field, hidden.what)
            return self._render(prompt, reads)
        except ChatError:
            raise
        # A template can fail with whatever an expression of Python can.
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ChatError(f"the model's chat template refuses it: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ChatError("the model's chat template refuses it: it is nested too deep") from None

    def _render(self, prompt: ChatPrompt, reads: "Reads") -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            [_message(message, reads) for message in prompt.messages],
            tools=[_tool(tool) for tool in prompt.tools] or None,
            tokenize=False,
            add_generation_prompt=prompt.add_generation_prompt,
            **prompt.template_arguments,
        )
        return rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What a template looks at in any of its branches: variables it is given, and keys of whatever it is given."""

    variables: frozenset[str]
    keys: frozenset[str]


class _Generation(jinja2.ext.Extension):
    """A block that transformers adds to the language, to mark what the assistant says; here it is what is inside."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it an attribute of instances

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def reads_of(template: str) -> Reads:
    """Read a template without running it; raises jinja2.TemplateError.

    A render shows one path only: an argument which makes no difference to one conversation is not thereby unknown.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.globals |= dict.fromkeys(("raise_exception", "strftime_now"))
    tree = environment.parse(template)
    keys = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    # message["name"], "name" in message, message.get("name")
    keys |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return Reads(variables=frozenset(jinja2.meta.find_undeclared_variables(tree)), keys=frozenset(keys))


def _require_read(prompt: ChatPrompt, reads: Reads) -> None:
    if prompt.tools and "tools" not in reads.variables:
        raise UnusedFieldError("chat.tools", "tools")
    if not prompt.add_generation_prompt and "add_generation_prompt" not in reads.variables:
        raise UnusedFieldError("chat.add_generation_prompt", "it")
    for name in prompt.template_arguments:
        if name not in reads.variables:
            raise UnusedFieldError(f"chat.template_arguments[{name!r}]", "this argument")
    for index, message in enumerate(prompt.messages):
        path = f"chat.messages[{index}]"
        if message.reasoning is not None and not reads.keys.intersection(_REASONING):
            raise UnusedFieldError(f"{path}.reasoning", "reasoning")
        if message.tool_calls and "tool_calls" not in reads.keys:
            raise UnusedFieldError(f"{path}.tool_calls", "calls of tools")
    if "tool_call_id" not in reads.keys:
        _require_order(prompt.messages)


def _require_order(messages: tuple[Message, ...]) -> None:
    """Refuse answers of tools that a template which shows no ids would take for answers to other calls."""
    waiting: list[ToolCall] = []
    for index, message in enumerate(messages):
        if message.role != "tool":
            waiting = list(message.tool_calls)
        elif waiting:
            call = waiting.pop(0)
            if None not in (call.id, message.tool_call_id) and call.id != message.tool_call_id:
                raise ChatError(
                    f"messages[{index}].tool_call_id is {message.tool_call_id!r}, but the model's chat template shows "
                    f"no ids and would have it answer {call.id!r}; send answers in the order of the calls"
                )


def _message(message: Message, reads: Reads) -> dict[str, Any]:
    """Return a turn as templates expect it: what was not given is absent, but for the content, which all read."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.reasoning is not None:
        turn |= {name: message.reasoning for name in _REASONING if name in reads.keys}
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _tool_call(call: ToolCall) -> Mapping[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"type": "function"} | ({"id": call.id} if call.id is not None else {}) | {"function": function}


def _tool(tool: Tool) -> Mapping[str, Any]:
    """Return a function as transformers describes one; without parameters it takes none."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = dict(tool.parameters or {"type": "object", "properties": {}})
    return {"type": "function", "function": function}
