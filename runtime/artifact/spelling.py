"""What single tokens of a tokenizer spell. Knows no library: only the decoder's own description."""

from typing import Any


class Speller:
    """The bytes that a token adds inside a text, by the steps of a tokenizers decoder (its JSON; None: it has none)."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        """Raises ValueError for a decoder that does not treat tokens one by one."""
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        self.has_steps = bool(steps)
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = False
        self._byte_fallback = False
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self._replacements.append((old, new))
                case {"type": "Metaspace", "replacement": old}:
                    self._replacements.append((old, " "))
                case {"type": "Fuse" | "Strip"}:  # Strip is about the beginning of a text, and a completion has none
                    pass
                case {"type": other}:
                    raise ValueError(f"the tokenizer's decoder {other} does not spell tokens one by one")

    def __call__(self, token: str) -> bytes:
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return token.encode("utf-8")


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes: printable ones for themselves, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
