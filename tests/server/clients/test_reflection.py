"""A client that knows an address and the reflection protocol: it asks the server for everything else."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

pytestmark = pytest.mark.system

PATIENCE = 60.0
TEXT = "the ü of 漢字 and 👩‍🚀 €"


class Reflected:
    """All services of a server, called by name with JSON; the classes of their messages come from the server alone."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._pool = DescriptorPool()
        self._known: set[str] = set()
        listing = self._ask(list_services="")
        self.services: dict[str, ServiceDescriptor] = {}
        for name in [service.name for service in listing.list_services_response.service]:
            self._learn(self._ask(file_containing_symbol=name))
            self.services[name] = self._pool.FindServiceByName(name)

    def call(self, service: str, method: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the answers, as many as there are."""
        found = self.services[service].methods_by_name[method]
        message = json_format.ParseDict(request, GetMessageClass(found.input_type)(), descriptor_pool=self._pool)
        kind = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        stub = kind(
            f"/{service}/{method}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        answer = stub(message, timeout=PATIENCE)
        for one in answer if found.server_streaming else [answer]:
            yield json_format.MessageToDict(one, preserving_proto_field_name=True, descriptor_pool=self._pool)

    def _ask(self, **question: str) -> reflection_pb2.ServerReflectionResponse:
        stub = reflection_pb2_grpc.ServerReflectionStub(self._channel)
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=PATIENCE
        )
        assert not answer.HasField("error_response"), answer.error_response
        return answer

    def _learn(self, answer: reflection_pb2.ServerReflectionResponse) -> None:
        """Take files in, those that they import first, asking for what did not come along."""
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
        for file in files:
            for name in file.dependency:
                if name not in self._known | {file.name for file in files}:
                    self._learn(self._ask(file_by_filename=name))
        while fresh := [file for file in files if file.name not in self._known]:
            ready = [file for file in fresh if self._known.issuperset(file.dependency)]
            assert ready, "files import each other in a circle"
            for file in ready:
                self._pool.Add(file)
                self._known.add(file.name)


@pytest.fixture
def reflected(parrot: Any) -> Iterator[Reflected]:
    with grpc.insecure_channel(parrot.target) as channel:
        yield Reflected(channel)


def test_it_finds_all_services_and_their_methods(reflected: Reflected) -> None:
    assert reflected.services.keys() == {
        "pressd.v1.Inference",
        "pressd.v1.Control",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    methods = {method.name for method in reflected.services["pressd.v1.Inference"].methods}
    assert methods == {"Generate", "GenerateStream", "Tokenize", "Detokenize", "Score", "Cancel"}


def test_it_streams_a_completion(reflected: Reflected) -> None:
    (tokenized,) = reflected.call("pressd.v1.Inference", "Tokenize", {"text": TEXT})
    request = {"prompt": TEXT, "output": {"token_ids": True}, "sampling": {"seed": str(2**64 - 1)}}
    accepted, *deltas, finished = reflected.call("pressd.v1.Inference", "GenerateStream", request)
    assert accepted["accepted"]["seed"] == finished["finished"]["seed"] == str(2**64 - 1)
    assert "".join(event["delta"]["text"] for event in deltas) == TEXT
    assert [token["id"] for event in deltas for token in event["delta"]["tokens"]] == tokenized["ids"]
    assert finished["finished"]["reason"] == "FINISH_REASON_EOS"
    assert finished["finished"]["usage"]["completion_tokens"] == len(tokenized["ids"])


def test_it_learns_what_it_may_ask(reflected: Reflected) -> None:
    (model,) = reflected.call("pressd.v1.Control", "GetModel", {})
    honoured = model["capabilities"]["request_fields"]
    message = reflected.services["pressd.v1.Inference"].methods_by_name["Generate"].input_type
    for path in honoured:
        inner = message
        for name in path.split("."):
            field = inner.fields_by_name[name]
            inner = field.message_type
    assert "prompt" in honoured
