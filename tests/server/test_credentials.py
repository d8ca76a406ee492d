"""TLS by files, with certificates made by openssl, over real connections."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pressd.server.credentials import TlsFiles, server_credentials
from pressd.v1 import control_pb2, control_pb2_grpc

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes certificates, is absent")

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Signs certificates; each has a name of its own, by which a test tells them apart."""

    def __init__(self, folder: Path, name: str) -> None:
        self.cert, self._key, self._folder = folder / f"{name}.pem", folder / f"{name}.key", folder
        subject = f"/CN={name}"
        openssl("req", "-x509", *CURVE, "-days", "2", "-subj", subject, "-keyout", self._key, "-out", self.cert)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return a certificate for this machine, and its key."""
        request, cert, key = (self._folder / f"{name}.{kind}" for kind in ("csr", "pem", "key"))
        names = self._folder / "names"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("req", *CURVE, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signed_by = ("-CA", self.cert, "-CAkey", self._key, "-CAcreateserial")
        openssl("x509", "-req", "-in", request, *signed_by, "-days", "2", "-extfile", names, "-out", cert)
        return cert, key


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def who_answers(server: Any, authority: Authority, client: tuple[Path, Path] | None = None) -> str:
    """The name in the certificate that a new connection gets; raises ssl.SSLError if there is none."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.set_alpn_protocols(["h2"])
    if client is not None:
        context.load_cert_chain(*client)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        if not connection.recv(1):  # with TLS 1.3 a server refuses a client after the handshake
            raise ConnectionError("refused")
        subject = connection.getpeercert()["subject"]  # type: ignore[index]
        return str(dict(pair for part in subject for pair in part)["commonName"])  # type: ignore[misc]


def channel_to(server: Any, authority: Authority, client: tuple[Path, Path] | None = None) -> grpc.Channel:
    cert, key = (path.read_bytes() for path in client) if client else (None, None)
    return grpc.secure_channel(server.target, grpc.ssl_channel_credentials(authority.cert.read_bytes(), key, cert))


def asks(channel: grpc.Channel) -> str:
    """The version that the server tells, asked over a channel."""
    info = control_pb2_grpc.ControlStub(channel).GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=60)
    return str(info.version)


@pytest.mark.system
def test_a_renewed_certificate_is_for_new_connections(
    serve: Callable[..., Any], echo: Path, tmp_path: Path, authority: Authority
) -> None:
    # As Kubernetes mounts a Secret: the files are links through a link that is turned in one step.
    for number in ("first", "second"):
        cert, key = authority.issue(number)
        (folder := tmp_path / f"secret-{number}").mkdir()
        cert.rename(folder / "tls.crt")
        key.rename(folder / "tls.key")
    (mounted := tmp_path / "mounted").symlink_to("secret-first")
    server = serve(echo, "--tls-cert", str(mounted / "tls.crt"), "--tls-key", str(mounted / "tls.key"))
    with channel_to(server, authority) as old:
        assert asks(old)
        assert who_answers(server, authority) == "first"
        (tmp_path / "turned").symlink_to("secret-second")
        (tmp_path / "turned").rename(mounted)
        assert who_answers(server, authority) == "second"
        assert asks(old), "an old connection goes on"
        # A key that does not belong to its certificate is not used.
        (tmp_path / "secret-second" / "tls.key").write_bytes((tmp_path / "secret-first" / "tls.key").read_bytes())
        assert who_answers(server, authority) == who_answers(server, authority) == "second"
    told = [line for line in server.log_lines() if line["event"] == "changed files are not used"]
    assert [("do not belong together" in line["cause"], line["what"]) for line in told] == [(True, "certificate")]
    with grpc.insecure_channel(server.target) as plain, pytest.raises(grpc.RpcError) as caught:
        asks(plain)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.stop() == 0


@pytest.mark.system
def test_clients_can_be_asked_for_certificates(
    serve: Callable[..., Any], echo: Path, tmp_path: Path, authority: Authority
) -> None:
    (other_folder := tmp_path / "others").mkdir()
    stranger, friend = Authority(other_folder, "stranger").issue("mallory"), authority.issue("alice")
    cert, key = authority.issue("server")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.cert))
    server = serve(echo, *flags)
    with channel_to(server, authority, friend) as channel:
        assert asks(channel)
    for client in (None, stranger):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            who_answers(server, authority, client)
        with channel_to(server, authority, client) as channel, pytest.raises(grpc.RpcError):
            asks(channel)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda files: files["cert"].unlink(), "--tls-cert .*: No such file"),
        (lambda files: files["key"].write_text("x"), "--tls-key .* holds no private key"),
        (lambda files: files["cert"].write_text(files["key"].read_text()), "--tls-cert .* holds no certificate"),
        (lambda files: files["key"].write_text(files["other"].read_text()), "do not belong together"),
        (lambda files: files["client_ca"].write_text("-----BEGIN CERTIFICATE-----\nx"), "--tls-client-ca .* damaged"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, authority: Authority, spoil: Callable[[dict[str, Path]], object], complaint: str
) -> None:
    cert, key = authority.issue("server")
    _, other = authority.issue("other")
    files = {"cert": cert, "key": key, "other": other, "client_ca": authority.cert}
    spoil(files)
    with pytest.raises(ValueError, match=complaint):
        server_credentials(TlsFiles(cert=cert, key=key, client_ca=authority.cert))


def test_a_key_with_a_passphrase_is_refused_without_asking(tmp_path: Path, authority: Authority) -> None:
    cert, key = authority.issue("server")
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked)
    with pytest.raises(ValueError, match="passphrase"):
        server_credentials(TlsFiles(cert=cert, key=locked))
