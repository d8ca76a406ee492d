"""A client of pressd servers: `Client` for programs, `AsyncClient` for asyncio."""

from pressd.client.asynchronous import AsyncClient
from pressd.client.errors import CallError
from pressd.client.synchronous import Client

__all__ = ["AsyncClient", "CallError", "Client"]
