"""The client for ordinary programs."""

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pressd.client.connection import DEFAULT_TARGET, Connection, Tls
from pressd.client.errors import CallError
from pressd.client.messages import Message, Prompt, generate_request, score_request, tokenize_request
from pressd.client.options import GenerateOptions
from pressd.client.retry import DEFAULT_RETRY, NO_RETRY, Attempts, Retry
from pressd.v1 import (
    control_pb2,
    control_pb2_grpc,
    generate_pb2,
    inference_pb2_grpc,
    load_pb2,
    model_pb2,
    score_pb2,
    tokens_pb2,
)

READINESS = "pressd.v1.Inference"


class Client:
    """Talks to one server, or with `dns:///NAME:PORT` to all of a name; threads may share it. Failures are CallError.

    `timeout` is in seconds, for each call with all its attempts and its time in the queue; every method takes another
    one, and the two that watch have none of their own accord. `retry` says which failures are tried again (see Retry),
    None that none is. `token` goes over TLS, to this machine, or anywhere with `plaintext_token`. Raises ValueError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        retry: Retry | None = DEFAULT_RETRY,
        tls: Tls | bool = False,
        token: str | None = None,
        plaintext_token: bool = False,
    ) -> None:
        connection = Connection.to(target, tls=tls, token=token, plaintext_token=plaintext_token)
        if connection.credentials is None:
            self._channel = grpc.insecure_channel(target, connection.options)
        else:
            self._channel = grpc.secure_channel(target, connection.credentials, connection.options)
        self._metadata = connection.metadata
        self._timeout = timeout
        self._retry = retry or NO_RETRY
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> generate_pb2.GenerateResponse:
        """Return all completions as a GenerateResponse."""
        request = generate_request(prompt, options)
        answer: generate_pb2.GenerateResponse = self._call(self._inference.Generate, request, timeout)
        return answer

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[generate_pb2.GenerateEvent]:
        """Yield GenerateEvents as they come. Closing the iterator, or leaving it early, cancels the request."""
        request = generate_request(prompt, options)
        return self._events(self._inference.GenerateStream, request, self._timeout if timeout is None else timeout)

    def score(
        self,
        text: str | Sequence[int],
        *,
        top_logprobs: int | None = None,
        model: str = "",
        timeout: float | None = None,
    ) -> score_pb2.ScoreResponse:
        """Return the log-likelihood of a text or of token ids, as a ScoreResponse."""
        request = score_request(text, top_logprobs, model)
        score: score_pb2.ScoreResponse = self._call(self._inference.Score, request, timeout)
        return score

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a live request; its own call returns what exists."""
        self._call(self._inference.Cancel, generate_pb2.CancelRequest(request_id=request_id), timeout)

    def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        add_special_tokens: bool | None = None,
        model: str = "",
        timeout: float | None = None,
    ) -> list[int]:
        """Return the ids of a text, or of messages by the model's template."""
        request = tokenize_request(text, add_special_tokens, model)
        answer: tokens_pb2.TokenizeResponse = self._call(self._inference.Tokenize, request, timeout)
        return list(answer.ids)

    def detokenize(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str = "",
        timeout: float | None = None,
    ) -> str:
        """Return the text of ids."""
        request = tokens_pb2.DetokenizeRequest(ids=ids, skip_special_tokens=skip_special_tokens, model=model or None)
        text: str = self._call(self._inference.Detokenize, request, timeout).text
        return text

    def model(self, name: str = "", *, timeout: float | None = None) -> model_pb2.Model:
        """Return a Model: limits, capabilities, compression, memory."""
        request = control_pb2.GetModelRequest(name=name or None)
        model: model_pb2.Model = self._call(self._control.GetModel, request, timeout)
        return model

    def models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """Return all Models."""
        answer = self._call(self._control.ListModels, control_pb2.ListModelsRequest(), timeout)
        return list(answer.models)

    def server_info(self, *, timeout: float | None = None) -> control_pb2.ServerInfo:
        """Return the ServerInfo."""
        request = control_pb2.GetServerInfoRequest()
        info: control_pb2.ServerInfo = self._call(self._control.GetServerInfo, request, timeout)
        return info

    def load(self, model: str = "", *, timeout: float | None = None) -> load_pb2.LoadInfo:
        """Return how busy a model is, as a LoadInfo."""
        request = load_pb2.GetLoadRequest(model=model or None)
        load: load_pb2.LoadInfo = self._call(self._control.GetLoad, request, timeout)
        return load

    def watch_load(
        self, model: str = "", *, interval_ms: int | None = None, timeout: float | None = None
    ) -> Generator[load_pb2.LoadInfo]:
        """Yield a LoadInfo at once and then at intervals, until the server ends or the iterator is closed."""
        request = load_pb2.WatchLoadRequest(model=model or None, interval_ms=interval_ms)
        return self._events(self._control.WatchLoad, request, timeout)

    def flush_prefix_cache(self, model: str = "", *, timeout: float | None = None) -> int:
        """Forget all cached prefixes and return how many blocks held nothing else. Needs an admin's token."""
        request = control_pb2.FlushPrefixCacheRequest(model=model or None)
        return int(self._call(self._control.FlushPrefixCache, request, timeout).num_blocks)

    def drain(self, *, timeout_seconds: float | None = None, timeout: float | None = None) -> int:
        """End the server once its live requests are done, and return how many there are. Needs an admin's token.

        What still runs after `timeout_seconds` is ended; unset, the server's own time holds.
        """
        request = control_pb2.DrainRequest(timeout_seconds=timeout_seconds)
        return int(self._call(self._control.Drain, request, timeout).num_live)

    def is_serving(self, service: str = READINESS, *, timeout: float | None = None) -> bool:
        """Whether requests are taken now (nothing is tried again); with service "" whether the process is sound."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self._call(self._health.Check, request, timeout, NO_RETRY)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def watch_serving(self, service: str = READINESS, *, timeout: float | None = None) -> Generator[bool]:
        """Yield whether requests are taken, now and whenever it changes, until the server is gone."""
        request = health_pb2.HealthCheckRequest(service=service)
        for answer in self._events(self._health.Watch, request, timeout):
            yield bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Cancel what is running and disconnect."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None, retry: Retry | None = None) -> Any:
        attempts = Attempts(retry or self._retry, self._timeout if timeout is None else timeout)
        while True:
            try:
                return method(request, timeout=attempts.remaining, metadata=self._metadata)
            except grpc.RpcError as error:
                failure = CallError(error)
            attempts.retry.sleep(attempts.wait_after(failure))

    def _events(self, method: Any, request: Any, timeout: float | None) -> Generator[Any]:
        attempts = Attempts(self._retry, timeout)
        has_begun = False
        while True:
            call = method(request, timeout=attempts.remaining, metadata=self._metadata)
            try:
                for event in call:
                    has_begun = True
                    yield event
                return
            except grpc.RpcError as error:
                failure = CallError(error)
            finally:
                call.cancel()
            if has_begun:
                raise failure
            attempts.retry.sleep(attempts.wait_after(failure))
