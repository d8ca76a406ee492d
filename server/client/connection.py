"""Where a server is, how it is reached, and who asks: a target, TLS, a token."""

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

DEFAULT_TARGET = "127.0.0.1:50051"
Metadata = tuple[tuple[str, str], ...]

_UNIX = ("unix:", "unix-abstract:")
_SCHEMES = ("dns:", "ipv4:", "ipv6:", *_UNIX)
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # As much as servers send.
    ("grpc.max_receive_message_length", 64 << 20),
    # A call may be silent for minutes; a connection that is gone must not look like that.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Retry decides when to try again; a channel that waited longer would fail a call without having tried.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # No policy from the DNS may retry beside ours.
    ("grpc.service_config_disable_resolution", 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files: `ca` signs servers (unset: gRPC's list of public ones), `cert` and `key` show who we are."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise ValueError(f"a certificate and its key go together; give {missing} too")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raises ValueError."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read("ca", self.ca),
            private_key=_read("key", self.key),
            certificate_chain=_read("cert", self.cert),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What both clients make their channel of, and the metadata of every call."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, int | str], ...]
    metadata: Metadata

    @classmethod
    def to(cls, target: str, *, tls: Tls | bool, token: str | None, plaintext_token: bool) -> "Connection":
        """Check what was asked for; raises ValueError with one line.

        With `dns:///NAME:PORT` calls go to all addresses of the name in turn.
        """
        check_target(target)
        is_here = is_local(target)
        if token is not None and not tls and not is_here and not plaintext_token:
            raise ValueError(
                f"a token for {target} would be readable on its way; use TLS, or accept that with plaintext_token"
            )
        options = _OPTIONS
        if target.startswith("dns:"):
            options += (("grpc.service_config", _ROUND_ROBIN),)
        if is_here:
            options += (("grpc.enable_http_proxy", 0),)  # gRPC would send even this to $http_proxy
        credentials = (tls if isinstance(tls, Tls) else Tls()).credentials() if tls else None
        return cls(target=target, credentials=credentials, options=options, metadata=_authorization(token))


def check_target(target: str) -> str:
    """Return the target; raises ValueError if gRPC would not take it for what was meant."""
    is_pair = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:/\s]+):\d{1,5}", target)
    if not is_pair and not target.startswith(_SCHEMES):
        forms = "HOST:PORT, dns:///NAME:PORT or unix:PATH"
        raise ValueError(f"{target!r} is no address of a server; give {forms}")
    return target


def is_local(target: str) -> bool:
    """Whether what is sent there leaves this machine under no circumstances."""
    if target.startswith(_UNIX):
        return True
    scheme = next((scheme for scheme in _SCHEMES if target.startswith(scheme)), "")
    rest = target.removeprefix(scheme)
    if rest.startswith("//"):  # dns://authority/name
        authority, _, rest = rest.removeprefix("//").partition("/")
        if authority:  # a DNS server, which may call anything localhost
            return False
    addresses = rest.split(",") if scheme in ("ipv4:", "ipv6:") else [rest]
    return all(_is_loopback(address) for address in addresses)


def _is_loopback(address: str) -> bool:
    host = re.sub(r":\d+$", "", address).strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authorization(token: str | None) -> Metadata:
    if token is None:
        return ()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("the token is empty or has other characters than visible ASCII; give one as the server has it")
    return (("authorization", f"Bearer {token}"),)


def _read(what: str, path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"TLS {what} {path}: {error.strerror}; give a PEM file that can be read") from None
    if b"-----BEGIN " not in content:
        raise ValueError(f"TLS {what} {path} is no PEM file; give one with -----BEGIN ...-----")
    return content
