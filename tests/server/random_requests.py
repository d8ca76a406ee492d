"""Requests from a seed: sound ones, any values in any fields, and bytes that were a request."""

import math
import random
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct

from pressd.v1 import chat_pb2, control_pb2, generate_pb2, inference_pb2, sampling_pb2, score_pb2, tokens_pb2

METHODS = {
    method.name: method
    for file in (inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
# How often each is asked; the others once as often.
WEIGHTS = {"Generate": 8, "GenerateStream": 8, "Tokenize": 3, "Detokenize": 2, "Score": 3}
# Ids of the tokenizer of these tests; 0 ends a sequence.
VOCABULARY = 262
PROMPTS = ["a", "the", "the ü of 漢字 and 👩‍🚀 €"]
TEXTS = ["", "a", "the", "the ü of 漢字 and 👩‍🚀 €", "\x00", "\ufffd", "</s>", "parrot", "parrot@echo-1", "a" * 20_000]
TEXTS += ["[a-z]+", "(", '{"type": "object"}', "start: /a+/", "mine", "\u202e\n\r\t", "0" * 129, "{{ messages }}"]
TEXTS += ["(a{1000}){1000}", "(?=a)", '{"$ref": "#"}', '{"type": "array", "minItems": 100000}', "root ::= root root"]
INTEGERS = [0, 1, 2, 3, 7, 64, 65, 99, 100, 261, 262, 5000, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -0.0, 1.0, 0.5, 0.9, 1e-40, 100.0, 100.5, -1.0, 3.4e38, math.inf, -math.inf, math.nan]
# Field numbers that no message has.
UNKNOWN = b"\xb8\x3e\x01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What is sent to a method. A sound request has nothing wrong with it."""

    method: str
    data: bytes
    is_sound: bool


class Maker:
    """Requests to any method from a random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def request(self) -> Made:
        """One of four kinds: sound, with one or two fields changed, with any fields, of other bytes."""
        names = sorted(METHODS)
        (name,) = self.random.choices(names, [WEIGHTS.get(name, 1) for name in names])
        message = self.sound(name)
        kind = self.random.choice(["sound", "changed", "changed", "filled", "broken"])
        if kind == "changed":
            for _ in range(self.random.choice([1, 1, 2])):
                self.change(message)
        if kind == "filled":
            self.fill(message, self.random.choice([0.05, 0.3]))
        data = message.SerializeToString()
        return Made(method=name, data=self.broken(data) if kind == "broken" else data, is_sound=kind == "sound")

    def sound(self, method: str) -> Message:
        """A request with nothing wrong, short to compute."""
        match method:
            case "Generate" | "GenerateStream":
                return self.generation()
            case "Tokenize" if self.random.random() < 0.5:
                return tokens_pb2.TokenizeRequest(chat=self.chat(), offsets=self.flip())
            case "Tokenize":
                return tokens_pb2.TokenizeRequest(text=self.random.choice(PROMPTS), add_special_tokens=self.flip())
            case "Detokenize":
                return tokens_pb2.DetokenizeRequest(ids=self.ids(), skip_special_tokens=self.flip())
            case "Score" if self.random.random() < 0.5:
                return score_pb2.ScoreRequest(token_ids={"ids": self.ids()}, top_logprobs=self.random.randrange(4))
            case "Score":
                return score_pb2.ScoreRequest(text=self.random.choice(PROMPTS))
            case "Cancel":
                return generate_pb2.CancelRequest(request_id=self.random.choice(["mine", "nobody"]))
        return GetMessageClass(METHODS[method].input_type)()

    def generation(self) -> generate_pb2.GenerateRequest:
        """Any options that go together."""
        most, shows_text = self.random.randrange(1, 9), self.random.random() < 0.8
        inputs: list[dict[str, Any]] = [{"prompt": self.random.choice(PROMPTS)}, {"token_ids": {"ids": self.ids()}}]
        request = generate_pb2.GenerateRequest(**self.random.choice([*inputs, {"chat": self.chat()}]))
        request.sampling.MergeFrom(
            sampling_pb2.SamplingParams(
                **self.some(
                    temperature=self.random.choice([0.0, 0.7, 100.0]),
                    top_p=0.9,
                    top_k=self.random.choice([1, 2**32 - 1]),
                    min_p=self.random.choice([0.0, 1.0]),
                    typical_p=1.0,
                    repetition_penalty=1.1,
                    presence_penalty=-100.0,
                    frequency_penalty=100.0,
                    seed=2**64 - 1,
                    num_sequences=self.random.randrange(1, 5),
                    logit_bias={self.random.randrange(VOCABULARY): -100.0},
                    bad_words=["the", "ü"],
                )
            )
        )
        request.stopping.MergeFrom(
            sampling_pb2.StoppingParams(
                max_new_tokens=most,
                **self.some(
                    min_new_tokens=self.random.randrange(most + 1),
                    stop=[self.random.choice(PROMPTS)[:2], "€"],
                    stop_token_ids=self.ids(),
                    include_stop=self.flip(),
                    ignore_eos=self.flip(),
                ),
            )
        )
        request.output.MergeFrom(
            generate_pb2.OutputOptions(
                text=shows_text,
                **self.some(
                    token_ids=self.flip(),
                    logprobs=self.flip(),
                    top_logprobs=self.random.randrange(4),
                    prompt_logprobs=self.flip(),
                    echo_prompt=shows_text and self.flip(),
                    skip_special_tokens=self.flip(),
                    stream_min_tokens=self.random.randrange(1, 20),
                    stream_max_delay_ms=self.random.randrange(3),
                ),
            )
        )
        request.runtime.MergeFrom(
            generate_pb2.RuntimeOptions(
                **self.some(
                    bypass_prefix_cache=self.flip(), cache_salt="salt", exactness=generate_pb2.EXACTNESS_LOSSLESS
                )
            )
        )
        request.scheduling.MergeFrom(
            generate_pb2.SchedulingOptions(
                **self.some(
                    priority=self.random.choice([-(2**31), 2**31 - 1]),
                    queue_timeout_ms=2**32 - 1,
                    time_budget_ms=2**32 - 1,
                    max_prompt_tokens=self.random.randrange(1, 9),
                )
            )
        )
        if self.random.random() < 0.05:
            request.stopping.ClearField("max_new_tokens")
        if self.random.random() < 0.1:
            request.constraint.choice.texts.extend(["the", "a"])
            request.stopping.ClearField("min_new_tokens")  # it may ask for more than there is to choose from
            request.sampling.ClearField("bad_words")
        return request

    def chat(self) -> chat_pb2.ChatInput:
        messages = [
            {"role": "user", "content": self.random.choice(PROMPTS)} for _ in range(self.random.randrange(1, 4))
        ]
        return chat_pb2.ChatInput(messages=messages, **self.some(add_generation_prompt=self.flip()))

    def some(self, **options: Any) -> dict[str, Any]:
        """A few of these."""
        return {name: value for name, value in options.items() if self.random.random() < 0.2}

    def flip(self) -> bool:
        return self.random.random() < 0.5

    def ids(self) -> list[int]:
        return [self.random.randrange(1, VOCABULARY) for _ in range(self.random.randrange(1, 6))]

    def change(self, message: Message) -> None:
        """Give a field, anywhere in it, some value of its type."""
        field = self.random.choice(message.DESCRIPTOR.fields or [None])
        if field is None:
            return
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name == Struct.DESCRIPTOR.full_name:
            self.set(message, field, 0.3)
        elif field.is_repeated:
            self.change(getattr(message, field.name).add())
        else:
            self.change(getattr(message, field.name))

    def fill(self, message: Message, density: float) -> None:
        """Set each field with this probability."""
        for field in message.DESCRIPTOR.fields:
            inner = field.message_type
            if inner is not None and not field.is_repeated and inner.full_name != Struct.DESCRIPTOR.full_name:
                if self.random.random() < min(1.0, 3 * density):
                    getattr(message, field.name).SetInParent()
                    self.fill(getattr(message, field.name), density)
            elif self.random.random() < density:
                self.set(message, field, density)
        if self.random.random() < density / 10:
            message.MergeFromString(UNKNOWN)

    def set(self, message: Message, field: FieldDescriptor, density: float) -> None:
        values = getattr(message, field.name)
        inner = field.message_type
        if inner is None and not field.is_repeated:
            setattr(message, field.name, self.scalar(field))
        elif inner is None:
            values.extend(self.scalar(field) for _ in range(self.random.choice([1, 1, 2, 5, 300])))
        elif inner.GetOptions().map_entry:
            for _ in range(self.random.choice([1, 3, 2000])):
                values[self.scalar(inner.fields_by_name["key"])] = self.scalar(inner.fields_by_name["value"])
        elif inner.full_name == Struct.DESCRIPTOR.full_name:
            values.update(self.struct(self.random.choice([1, 3, 40, 60])))
        else:
            for _ in range(self.random.choice([1, 2, 5])):
                self.fill(values.add(), max(density, 0.3))

    def scalar(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                return self.random.choice(TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.random.random() < 0.5
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return self.random.choice(FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM | FieldDescriptor.CPPTYPE_INT32:
                return self.random.choice([0, 1, 2, 3, 4, 77, 2**31 - 1, -(2**31)])
        bits = 32 if field.cpp_type == FieldDescriptor.CPPTYPE_UINT32 else 64
        return self.random.choice([value for value in INTEGERS if value < 2**bits])

    def struct(self, depth: int) -> dict[str, Any]:
        """Nested as deep as asked."""
        found: dict[str, Any] = {self.random.choice(TEXTS): self.random.choice([None, True, *FLOATS, *TEXTS])}
        for _ in range(depth - 1):
            found = {self.random.choice(TEXTS): found, "list": [found]} if depth < 4 else {"in": found}
        return found

    def broken(self, data: bytes) -> bytes:
        """Other bytes, made of these."""
        made = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            place = self.random.randrange(len(made) + 1)
            match self.random.randrange(5):
                case 0 if place < len(made):
                    made[place] ^= 1 << self.random.randrange(8)
                case 1:
                    del made[place:]
                case 2:
                    made[place:place] = self.random.randbytes(self.random.randrange(1, 9))
                case 3:
                    made += made[place:]
                case _:
                    other = self.sound(self.random.choice(sorted(METHODS))).SerializeToString()
                    made[place:] = other[self.random.randrange(len(other) + 1) :]
        return bytes(made)
