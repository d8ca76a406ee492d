"""TLS: a certificate and its key from files, as they are whenever a connection begins."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from pressd.server.reloaded import Reloaded

_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files. With `client_ca`, clients must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Pems:
    cert: bytes
    key: bytes
    client_ca: bytes | None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials that follow their files: a new connection gets the new certificate, old ones go on.

    What does not fit together is not used (see Reloaded). Raises ValueError naming flag, file and way out.
    """
    paths = [files.cert, files.key, *([files.client_ca] if files.client_ca else [])]
    pems = Reloaded("certificate", paths, lambda: _read(files))

    # gRPC calls this before each handshake, in a thread of its own, one call at a time.
    def renewed() -> Any:  # None, which the stubs do not know: nothing has changed
        return _configuration(pems.value) if pems.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(pems.value), renewed, require_client_authentication=files.client_ca is not None
    )


def _configuration(pems: _Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.client_ca)


def _read(files: TlsFiles) -> _Pems:
    """Read the files and check what was read, not what the files may be by then; raises ValueError."""
    cert = _pem("--tls-cert", files.cert, "CERTIFICATE-----")
    key = _pem("--tls-key", files.key, "PRIVATE KEY-----")
    _check_pair(files, cert, key)
    client_ca = None
    if files.client_ca is not None:
        client_ca = _pem("--tls-client-ca", files.client_ca, "CERTIFICATE-----")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            message = f"--tls-client-ca {files.client_ca} holds a damaged certificate; copy it again"
            raise ValueError(message) from None
    return _Pems(cert=cert, key=key, client_ca=client_ca)


def _pem(flag: str, path: Path, mark: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}; give a PEM file that the server may read") from None
    if mark.encode() not in content:
        kind = mark.rstrip("-").lower()
        raise ValueError(f"{flag} {path} holds no {kind}; give a PEM file with -----BEGIN ...{mark}")
    return content


def _check_pair(files: TlsFiles, cert: bytes, key: bytes) -> None:
    def no_password() -> bytes:  # without this, OpenSSL would ask at the terminal
        raise ValueError(f"--tls-key {files.key} is protected by a passphrase; store the key without one")

    with _in_memory(cert) as cert_name, _in_memory(key) as key_name:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_name, key_name, password=no_password)
        except ssl.SSLError as error:
            pair = f"--tls-cert {files.cert} and --tls-key {files.key}"
            if error.reason in _MISMATCHES:
                raise ValueError(f"{pair} do not belong together; give a certificate and its own key") from None
            raise ValueError(f"{pair} cannot be used: {error.reason or error}; copy or make them again") from None


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The name of a file that exists for the length of a block, and on no disk: `ssl` takes a key by name only."""
    with open(os.memfd_create("pem"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
