"""The promise in protos/: what is written about it, and that nothing of it is silently ignored."""

import itertools
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.struct_pb2 import Struct

from pressd.server.errors import Refusal
from pressd.server.fields import HONOURED, refuse_unsupported
from pressd.v1 import control_pb2, generate_pb2, inference_pb2, sampling_pb2, tokens_pb2

PROTOS = sorted((Path(__file__).parent.parent.parent / "protos/pressd/v1").glob("*.proto"))
METHODS = {
    method.name: method
    for file in (inference_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}


def leaves(message: Descriptor, path: str = "") -> dict[str, FieldDescriptor]:
    """Every field of a message that holds no further fields, by path."""
    found = {}
    for field in message.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or inner.full_name == Struct.DESCRIPTOR.full_name:
            found[f"{path}{field.name}"] = field
        else:
            found |= leaves(inner, f"{path}{field.name}.")
    return found


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_every_declaration_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    declaration = re.compile(r"^\s*(message|enum|service|rpc|oneof|\w[\w.<>, ]* \w+ = \d+;|optional|repeated|map)")
    for above, line in itertools.pairwise(lines):
        if declaration.match(line):
            assert above.strip().startswith("//"), f"{path.name}: {line.strip()}"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_value_of_a_request_means_unset(method: object) -> None:
    for path, field in leaves(METHODS[method.name].input_type).items():  # type: ignore[attr-defined]
        # An enum says so with its zero value, which is named for it.
        assert field.is_repeated or field.has_presence or field.enum_type is not None, path


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_zero_of_an_enum_is_unspecified(path: Path) -> None:
    for name, first in re.findall(r"enum (\w+) \{\s*(?://[^\n]*\s*)*(\w+) = 0;", path.read_text()):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert first == f"{prefix}_UNSPECIFIED"


@pytest.mark.parametrize("method", HONOURED)
def test_honoured_fields_exist(method: str) -> None:
    assert HONOURED[method] <= leaves(METHODS[method].input_type).keys()


def set_alone(message: object, path: str) -> None:
    """Set one leaf of a message to something that is not its default."""
    *outer, name = path.split(".")
    for part in outer:
        field = message.DESCRIPTOR.fields_by_name[part]  # type: ignore[attr-defined]
        message = getattr(message, part).add() if field.is_repeated else getattr(message, part)
    field = message.DESCRIPTOR.fields_by_name[name]  # type: ignore[attr-defined]
    values = {FieldDescriptor.CPPTYPE_STRING: "x", FieldDescriptor.CPPTYPE_BOOL: True}
    value = values.get(field.cpp_type, 1)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, name)[1] = value if field.message_type.full_name != "Struct" else "x"
    elif field.message_type is not None:
        getattr(message, name)["x"] = "x"
    elif field.is_repeated:
        getattr(message, name).append(value)
    else:
        setattr(message, name, value)


@pytest.mark.parametrize("path", leaves(generate_pb2.GenerateRequest.DESCRIPTOR))
def test_each_field_of_a_generation_is_honoured_or_refused_by_its_path(path: str) -> None:
    request = generate_pb2.GenerateRequest()
    set_alone(request, path)
    if path in HONOURED["Generate"]:
        refuse_unsupported("Generate", request)
        return
    with pytest.raises(Refusal) as caught:
        refuse_unsupported("Generate", request)
    assert caught.value.code.name == "UNIMPLEMENTED"
    assert caught.value.field is not None
    assert re.sub(r"\[\d+\]", "", caught.value.field).startswith(path)


def test_a_field_inside_a_list_is_named_with_its_place() -> None:
    request = generate_pb2.GenerateRequest()
    request.chat.messages.add(role="user", content="hello")
    request.chat.messages.add(role="user", content="hello").MergeFromString(b"\xb8\x3e\x01")
    with pytest.raises(Refusal) as caught:
        refuse_unsupported("Generate", request)
    assert caught.value.field == "chat.messages[1].999 of pressd.v1.ChatMessage"


def test_a_field_of_a_later_schema_is_refused() -> None:
    # Field 999, varint 1: the tag is (999 << 3 | 0) = 7992 = 0xB8 0x3E as a varint.
    inner = sampling_pb2.SamplingParams.FromString(b"\xb8\x3e\x01")
    request = generate_pb2.GenerateRequest(prompt="x", sampling=inner)
    with pytest.raises(Refusal, match=r"sampling\.999 of pressd\.v1\.SamplingParams"):
        refuse_unsupported("Generate", request)


def test_an_empty_group_of_options_asks_for_nothing() -> None:
    request = generate_pb2.GenerateRequest(prompt="x", runtime=generate_pb2.RuntimeOptions())
    refuse_unsupported("Generate", request)
    refuse_unsupported("Tokenize", tokens_pb2.TokenizeRequest(text="x"))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - HONOURED.keys()))
def test_a_method_that_is_absent_is_refused(method: str) -> None:
    with pytest.raises(Refusal, match=f"{method} is not in this build"):
        refuse_unsupported(method, generate_pb2.CancelRequest())
