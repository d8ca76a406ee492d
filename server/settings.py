"""What `pressd serve` is told: by flag, else by environment, else by file. The only reader of any of them."""

import ipaddress
import os
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pressd.runtime.config import (
    DEVICES,
    DTYPES,
    KV_DTYPES,
    DeviceName,
    DtypeName,
    EngineConfig,
    KernelPreference,
    KVDtypeName,
)
from pressd.server.model_source import default_name

PREFIX = "PRESSD_"
# What Kubernetes tells every pod about a service that is named pressd.
_SERVICE_LINKS = ("PRESSD_SERVICE_", "PRESSD_PORT_")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything `serve` can be told. Raises ValueError naming the setting and the way out."""

    model: Path
    served_name: str
    scheme: str | None = None
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 9464
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    kernels: KernelPreference = "fast"
    kv_dtype: KVDtypeName = "auto"
    kv_memory: int | None = None
    threads: int | None = None
    max_batch: int = 32
    max_step_tokens: int = 512
    target_itl: float = 0.25
    max_queue_requests: int = 256
    max_queue_tokens: int = 262144
    shutdown_timeout: float = 25.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        if self.port == self.metrics_port != 0:
            raise ValueError(f"--port and --metrics-port are both {self.port}; give one of them another")
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "--tls-key" if self.tls_key is None else "--tls-cert"
            raise ValueError(f"a certificate and its key go together; give {missing} too")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca asks clients for certificates, which takes TLS; give --tls-cert too")
        if self.is_open and not self.insecure:
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no {self.lacks}; give what is "
                "missing, bind to 127.0.0.1, or accept it with --insecure"
            )

    @property
    def is_open(self) -> bool:
        """Whether strangers can reach it and nothing keeps them out."""
        return bool(self.lacks) and not _is_loopback(self.host)

    @property
    def lacks(self) -> str:
        """What would keep strangers out and is not there; empty for nothing."""
        found = [] if self.tls_cert else ["encryption (--tls-cert, --tls-key)"]
        if not self.token_file and not self.tls_client_ca:
            found.append("way to know who calls (--token-file or --tls-client-ca)")
        return " and no ".join(found)

    def engine_config(self) -> EngineConfig:
        """What the engine is told; raises ValueError."""
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,
            kernels=self.kernels,
            kv_dtype=self.kv_dtype,
            kv_memory=self.kv_memory,
            max_batch=self.max_batch,
            max_step_tokens=self.max_step_tokens,
            target_itl=self.target_itl or None,
            threads=self.threads,
            code_cache=str(code_cache()),
            pins_cores=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How a setting is written: what reads its text (raises ValueError), and what --help says."""

    parse: Callable[[str], object] = str
    metavar: str | None = None
    short: str | None = None
    help: str


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise ValueError(f"give a whole number of at least {least}")
        return int(text)

    return parse


def _port(text: str) -> int:
    if text.startswith("tcp://"):
        raise ValueError("a Kubernetes service named pressd set it; disable enableServiceLinks, or pass the flag")
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 16:
        raise ValueError("give a port from 0 (any free one) to 65535")
    return int(text)


def _size(text: str) -> int:
    digits = text.rstrip("KMGiB")
    unit = text[len(digits) :]
    if unit not in _UNITS or not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise ValueError("give bytes, or a whole number of KiB, MiB or GiB such as 512MiB")
    return int(digits) * _UNITS[unit]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise ValueError("give seconds, 0 to 86400")
    return seconds


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("give true or false")
    return text.lower() in ("true", "1")


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"choose one of {', '.join(names)}")
        return text

    return parse


OPTIONS: dict[str, Option] = {
    "model": Option(
        metavar="MODEL", help="artifact, Hugging Face model directory, or an id on its hub: org/name[@revision]"
    ),
    "served_name": Option(metavar="NAME", help="name that requests use (the directory's name, or the id's last part)"),
    "scheme": Option(
        metavar="SCHEME",
        short="-s",
        help="press MODEL before it is served, such as w4a16g128; what comes out is kept in the user's cache",
    ),
    "host": Option(help="address to listen on (127.0.0.1)"),
    "port": Option(parse=_port, help="gRPC port (50051; 0 takes any free one)"),
    "metrics_port": Option(parse=_port, help="Prometheus port, always plain HTTP (9464; 0 takes any free one)"),
    "device": Option(parse=_choice(*DEVICES), help=f"{', '.join(DEVICES)} (auto)"),
    "dtype": Option(
        parse=_choice(*DTYPES), help=f"what layers compute in: {', '.join(DTYPES)} (auto: the model's own)"
    ),
    "kernels": Option(parse=_choice("fast", "reference"), help="fast, or reference: slow and plain (fast)"),
    "kv_dtype": Option(
        parse=_choice(*KV_DTYPES),
        help=f"what keys and values are stored in: {', '.join(KV_DTYPES)} (auto: what layers compute in)",
    ),
    "kv_memory": Option(parse=_size, metavar="SIZE", help="memory of the KV cache, e.g. 512MiB (by batch and context)"),
    "threads": Option(
        parse=_integer(1), help="threads that compute on a CPU (one for each core that the machine and its cgroup give)"
    ),
    "max_batch": Option(parse=_integer(1), help="most requests computed at once (32)"),
    "max_step_tokens": Option(parse=_integer(1), help="most tokens computed in one step (512)"),
    "target_itl": Option(
        parse=_seconds,
        metavar="SECONDS",
        help="longest step beside requests that wait for their next token; long prompts are cut to it (0.25; 0: not)",
    ),
    "max_queue_requests": Option(parse=_integer(0), help="most requests waiting for a place in the batch (256)"),
    "max_queue_tokens": Option(parse=_integer(1), help="most prompt tokens waiting (262144)"),
    "shutdown_timeout": Option(parse=_seconds, metavar="SECONDS", help="how long SIGTERM waits for requests (25)"),
    "tls_cert": Option(parse=Path, metavar="FILE", help="certificate chain in PEM, read again when it changes"),
    "tls_key": Option(parse=Path, metavar="FILE", help="its private key in PEM"),
    "tls_client_ca": Option(parse=Path, metavar="FILE", help="clients must show a certificate signed by one of these"),
    "token_file": Option(
        parse=Path,
        metavar="FILE",
        help="clients must send one of these tokens: a line each, `TOKEN` or `TOKEN admin`; read again when it changes",
    ),
    "insecure": Option(
        parse=_boolean, help="listen on other addresses than loopback without encryption, or for everybody"
    ),
    "log_level": Option(parse=_choice("debug", "info", "warning", "error"), help="debug, info, warning, error (info)"),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Give a parser one argument for each setting, and --config; nothing has a default here."""
    parser.add_argument("--config", metavar="FILE.toml", help="file of settings: the same names with _ for -")
    for name, option in OPTIONS.items():
        if name == "model":
            parser.add_argument(name, nargs="?", metavar=option.metavar, help=option.help)
        elif option.parse is _boolean:
            parser.add_argument(_flag(name), action="store_const", const="true", help=option.help)
        else:
            flags = [_flag(name)] if option.short is None else [option.short, _flag(name)]
            parser.add_argument(*flags, metavar=option.metavar, help=option.help)


def load(arguments: Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings; raises ValueError naming where a wrong one was written."""
    _refuse_unknown(environment)
    config = arguments.config or environment.get(f"{PREFIX}CONFIG")
    texts = dict(_from_file(Path(config))) if config else {}
    texts |= {
        name: (f"{PREFIX}{name.upper()}", environment[f"{PREFIX}{name.upper()}"])
        for name in OPTIONS
        if f"{PREFIX}{name.upper()}" in environment
    }
    given = {name: (_flag(name), getattr(arguments, name)) for name in OPTIONS}
    texts |= {name: (origin, text) for name, (origin, text) in given.items() if text is not None}
    # The types of values follow from OPTIONS, whose keys a test compares with the fields.
    values: dict[str, Any] = {name: _parse(name, origin, text) for name, (origin, text) in texts.items()}
    if "model" not in values:
        raise ValueError("MODEL is missing; give the directory of an artifact or of a Hugging Face model, or a hub id")
    values["model"] = Path(values["model"])
    values.setdefault("served_name", default_name(values["model"]))
    return Settings(**values)


def pressed_models(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that keeps what `--scheme` has pressed: the place of caches that freedesktop.org gives."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pressd" / "pressed"


def code_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that keeps kernels which were generated for this CPU."""
    return pressed_models(environment).with_name("code")


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _parse(name: str, origin: str, text: str) -> object:
    try:
        return OPTIONS[name].parse(text)
    except ValueError as error:
        raise ValueError(f"{origin} is {text!r}; {error}") from None


def _from_file(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    for key, value in content.items():
        if key not in OPTIONS:
            raise ValueError(f"{path}: {key!r} is not a setting; known are {', '.join(OPTIONS)}")
        if isinstance(value, bool):
            value = str(value).lower()
        if not isinstance(value, str | int | float):
            raise ValueError(f"{path}: {key} must be a text, a number, true or false")
        yield key, (f"{key} in {path}", str(value))


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in (*OPTIONS, "config")}
    for name in environment:
        if name.startswith(PREFIX) and name not in known and not name.startswith(_SERVICE_LINKS):
            raise ValueError(f"{name} in the environment is not a setting; known are {', '.join(sorted(known))}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


assert set(OPTIONS) == {field.name for field in fields(Settings)}
