"""A client of pressd servers: `Client` for programs, `AsyncClient` for asyncio."""

from pressd.client.asynchronous import AsyncClient
from pressd.client.connection import Tls
from pressd.client.errors import CallError
from pressd.client.options import GenerateOptions
from pressd.client.retry import Retry
from pressd.client.synchronous import Client

__all__ = ["AsyncClient", "CallError", "Client", "GenerateOptions", "Retry", "Tls"]
