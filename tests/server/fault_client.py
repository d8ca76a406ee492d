"""A client for tests to kill: it streams an answer to TARGET, and says on stdout what it has read."""

import sys

import grpc

from pressd.v1 import generate_pb2, inference_pb2_grpc, tokens_pb2


def main(target: str) -> None:
    request = generate_pb2.GenerateRequest(token_ids=tokens_pb2.TokenIds(ids=range(1, 11)))
    request.stopping.ignore_eos, request.stopping.max_new_tokens = True, 1000
    request.output.text = False
    with grpc.insecure_channel(target) as channel:
        for event in inference_pb2_grpc.InferenceStub(channel).GenerateStream(request):
            sys.stdout.write(f"{event.WhichOneof('event')}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
