"""A client made of compiled .proto files alone: python -S from_protos.py ADDRESS, with their folder on the path.

Run without site packages, so that pressd is not there to help; what it found goes to standard output as JSON.
"""

import importlib.util
import json
import sys

import grpc
from google.rpc import error_details_pb2, status_pb2

from pressd.v1 import control_pb2, control_pb2_grpc, generate_pb2, inference_pb2_grpc

PATIENCE = 60.0


def main(target: str, text: str) -> dict[str, object]:
    for room in ("server", "client", "runtime", "compress"):
        assert importlib.util.find_spec(f"pressd.{room}") is None, f"pressd.{room} can be imported"
    with grpc.insecure_channel(target) as channel:
        models = control_pb2_grpc.ControlStub(channel).ListModels(control_pb2.ListModelsRequest(), timeout=PATIENCE)
        inference = inference_pb2_grpc.InferenceStub(channel)
        request = generate_pb2.GenerateRequest(prompt=text)
        events = list(inference.GenerateStream(request, timeout=PATIENCE))
        whole = inference.Generate(request, timeout=PATIENCE)
        request.sampling.top_p = 7
        try:
            inference.Generate(request, timeout=PATIENCE)
        except grpc.RpcError as refused:
            error = refused
    trailers = {key: value for key, value in error.trailing_metadata() if key.endswith("-bin")}
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    bad = error_details_pb2.BadRequest()
    fields = [violation.field for detail in details if detail.Unpack(bad) for violation in bad.field_violations]
    return {
        "models": [model.name for model in models.models],
        "kinds": [event.WhichOneof("event") for event in events],
        "streamed": "".join(event.delta.text for event in events),
        "whole": whole.completions[0].text,
        "code": error.code().name,
        "fields": fields,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
