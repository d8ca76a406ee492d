"""The one error of structured output, and how a library's message becomes its line."""

MAX_MESSAGE = 300


class ConstraintError(ValueError):
    """One line: the kind of constraint, what is wrong with it and where.

    `impossible`: the constraint is well formed, but no text of this vocabulary can satisfy it. `lasting`: the same
    constraint will fail again, and it is small enough to be remembered.
    """

    def __init__(self, message: str, *, impossible: bool = False, lasting: bool = True) -> None:
        super().__init__(one_line(message))
        self.impossible = impossible
        self.lasting = lasting


def one_line(message: str) -> str:
    """Return a message's first line, and its last that begins with `error:`, cut to a readable length."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()] or ["unknown error"]
    cause = next((line for line in reversed(lines[1:]) if line.startswith("error:")), None)
    room = MAX_MESSAGE if cause is None else (MAX_MESSAGE - 1) // 2
    text = _cut(lines[0], room)
    return text if cause is None else f"{text} {_cut(cause, room)}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
