"""Which names of a conversation its template shows, found by rendering it with other names."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pressd.server.chat import ChatPrompt, Message, Tool, ToolCall

# What is put in for names. Nine letters and digits: some templates refuse ids of other lengths.
_NAME = re.compile(r"zq[0-9]{6,}x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Texts of which at least one is seen if the template shows what stands at `field`."""

    field: str
    what: str
    texts: tuple[str, ...]


def hidden_names(prompt: ChatPrompt, render: Callable[[ChatPrompt], str]) -> Iterator[Trace]:
    """Yield a trace of every tool, call and speaker that is not seen in the rendered conversation.

    Reading the template cannot tell: `name` is in all that know tools, and some show a turn's calls or its content, but
    not both. So names are put in whose like is in no text. Answers of tools keep theirs: their order is enough.
    """
    probe = _Probe()
    changed = probe.conversation(prompt)
    if probe.traces:
        # All at once: a search for each would take time by the square of what a client sends.
        shown = set(_NAME.findall(render(changed)))
        yield from (trace for trace in probe.traces if shown.isdisjoint(trace.texts))


class _Probe:
    """Gives new names to what it is shown, and remembers them."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self._names = (f"zq{number:06d}x" for number in itertools.count())
        self._ids: dict[str, str] = {}

    def conversation(self, prompt: ChatPrompt) -> ChatPrompt:
        messages = tuple(self._message(turn, f"chat.messages[{n}]") for n, turn in enumerate(prompt.messages))
        tools = tuple(self._tool(tool, f"chat.tools[{n}]") for n, tool in enumerate(prompt.tools))
        return replace(prompt, messages=messages, tools=tools)

    def _message(self, message: Message, path: str) -> Message:
        calls = tuple(self._call(call, f"{path}.tool_calls[{n}]") for n, call in enumerate(message.tool_calls))
        name, answered = message.name, message.tool_call_id
        if name is not None and message.role != "tool":
            name = next(self._names)
            self._note(f"{path}.name", "names of speakers", name)
        if answered is not None:
            answered = self._ids.get(answered, answered)
        return replace(message, tool_calls=calls, name=name, tool_call_id=answered)

    def _call(self, call: ToolCall, path: str) -> ToolCall:
        name = next(self._names)
        if call.id is None:
            self._note(path, "calls of tools in this turn", name)
            return replace(call, name=name)
        # Some templates show the id alone, which is made of the name then.
        self._ids[call.id] = next(self._names)
        self._note(path, "calls of tools in this turn", name, self._ids[call.id])
        return replace(call, name=name, id=self._ids[call.id])

    def _tool(self, tool: Tool, path: str) -> Tool:
        name = next(self._names)
        self._note(path, "tools in this conversation", name)
        return replace(tool, name=name)

    def _note(self, field: str, what: str, *texts: str) -> None:
        self.traces.append(Trace(field=field, what=what, texts=texts))
