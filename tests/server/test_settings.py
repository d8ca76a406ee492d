"""What `serve` can be told, in which spelling, and who wins."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from pressd.server import settings
from pressd.server.settings import Settings

# Every flag of `serve`. A flag is added here in the same change that makes it work.
FLAGS = {
    "--config",
    "--device",
    "--dtype",
    "--host",
    "--insecure",
    "--kernels",
    "--kv-dtype",
    "--kv-memory",
    "--log-level",
    "--max-batch",
    "--max-queue-requests",
    "--max-queue-tokens",
    "--max-step-tokens",
    "--metrics-port",
    "--port",
    "--scheme",
    "--served-name",
    "--shutdown-timeout",
    "--target-itl",
    "--threads",
    "--tls-cert",
    "--tls-client-ca",
    "--tls-key",
    "--token-file",
    "-s",
}


def parser() -> ArgumentParser:
    made = ArgumentParser(add_help=False)
    settings.add_arguments(made)
    return made


def load(*arguments: str, **environment: str) -> Settings:
    return settings.load(parser().parse_args(arguments), environment)


def test_flags_are_these() -> None:
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert flags == FLAGS


def test_every_flag_is_a_variable_and_a_key(tmp_path: Path) -> None:
    texts = {
        "model": "here",
        "served_name": "name",
        "scheme": "w8a8",
        "host": "::1",
        "port": "1",
        "metrics_port": "2",
        "device": "cpu",
        "dtype": "float32",
        "kernels": "reference",
        "kv_dtype": "int8",
        "kv_memory": "3MiB",
        "threads": "3",
        "max_batch": "4",
        "max_step_tokens": "5",
        "target_itl": "0.125",
        "max_queue_requests": "6",
        "max_queue_tokens": "7",
        "shutdown_timeout": "8.5",
        "tls_cert": "cert.pem",
        "tls_key": "key.pem",
        "tls_client_ca": "ca.pem",
        "token_file": "tokens",
        "insecure": "true",
        "log_level": "debug",
    }
    assert set(texts) == set(settings.OPTIONS)
    flags = [
        part
        for name, text in texts.items()
        if name not in ("model", "insecure")
        for part in (f"--{name.replace('_', '-')}", text)
    ]
    by_flag = load(texts["model"], "--insecure", *flags)
    file = tmp_path / "serve.toml"
    file.write_text("".join(f"{name} = '{text}'\n" for name, text in texts.items()))
    by_file = load("--config", str(file))
    by_environment = load(**{f"PRESSD_{name.upper()}": text for name, text in texts.items()})
    assert by_flag == by_file == by_environment
    assert by_flag != load("here", "--served-name", "name")
    assert by_flag.engine_config().kv_dtype == "int8"
    assert (by_flag.kv_memory, by_flag.shutdown_timeout, by_flag.insecure) == (3 << 20, 8.5, True)


def test_flag_wins_over_environment_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("model = 'm'\nport = 1\nmetrics_port = 9\nmax_batch = 1\ninsecure = true\n")
    loaded = load("--port", "3", PRESSD_CONFIG=str(file), PRESSD_PORT="2", PRESSD_METRICS_PORT="2")
    assert (loaded.port, loaded.metrics_port, loaded.max_batch, loaded.insecure) == (3, 2, 1, True)


def test_served_name_is_the_directorys(tmp_path: Path) -> None:
    assert load(str(tmp_path / "folder" / "..")).served_name == tmp_path.name
    assert load("org/name@v1.0", "-s", "w4a16").served_name == "name"


def test_what_is_pressed_is_kept_with_other_caches(tmp_path: Path) -> None:
    assert settings.pressed_models({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "pressd/pressed"
    assert settings.pressed_models({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache/pressd/pressed"


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        ((), {}, "MODEL is missing"),
        (("m", "--port", "65536"), {}, "--port is '65536'; give a port"),
        (("m", "--port", "-1"), {}, "--port is '-1'"),
        (("m", "--max-batch", "0"), {}, "--max-batch is '0'; give a whole number of at least 1"),
        (("m", "--kv-memory", "5MB"), {}, "--kv-memory is '5MB'; give bytes"),
        (("m", "--kv-memory", "MiB"), {}, "--kv-memory is 'MiB'"),
        (("m", "--kv-dtype", "fp4"), {}, "--kv-dtype is 'fp4'; choose one of auto, bf16, int8, fp8"),
        (("m", "--device", "tpu"), {}, "--device is 'tpu'; choose one of auto, cpu, cuda"),
        (("m", "--shutdown-timeout", "nan"), {}, "--shutdown-timeout is 'nan'; give seconds"),
        (("m", "--host", "0.0.0.0"), {}, "host 0.0.0.0 can be reached from other machines"),
        (("m", "--host", "example.org"), {}, "accept it with --insecure"),
        (("m", "--config", "absent.toml"), {}, "--config absent.toml"),
        (("m", "--port", "9464"), {}, "--port and --metrics-port are both 9464; give one"),
        (("m",), {"PRESSD_PROT": "1"}, "PRESSD_PROT in the environment is not a setting"),
        (("m",), {"PRESSD_PORT": "tcp://10.0.0.1:50051"}, "disable enableServiceLinks"),
        (("m",), {"PRESSD_INSECURE": "yes"}, "PRESSD_INSECURE is 'yes'; give true or false"),
    ],
)
def test_wrong_setting_is_named_with_a_way_out(
    arguments: tuple[str, ...], environment: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        load(*arguments, **environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("prot = 1", "'prot' is not a setting"), ("port = [1]", "port must be"), ("port = ", "Invalid value")],
)
def test_wrong_file_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load("m", "--config", str(file))


def test_what_kubernetes_says_about_a_service_named_pressd_is_no_typo() -> None:
    links = {"PRESSD_SERVICE_HOST": "10.0.0.1", "PRESSD_PORT_50051_TCP_ADDR": "10.0.0.1"}
    assert load("m", **links) == load("m")


def test_other_hosts_are_bound_when_that_is_accepted() -> None:
    assert load("m", "--host", "0.0.0.0", "--insecure").host == "0.0.0.0"
    assert load("m", "--host", "127.3.2.1").host == "127.3.2.1"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "no encryption .* and no way to know who calls"),
        (("--tls-cert", "c", "--tls-key", "k"), "there is no way to know who calls"),
        (("--token-file", "t"), "there is no encryption .*; give what is missing"),
        (("--tls-cert", "c", "--tls-key", "k", "--token-file", "t"), None),
        (("--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a"), None),
    ],
)
def test_other_hosts_need_encryption_and_callers_that_are_known(flags: tuple[str, ...], complaint: str | None) -> None:
    if complaint is None:
        assert not load("m", "--host", "0.0.0.0", *flags).is_open
        return
    with pytest.raises(ValueError, match=complaint):
        load("m", "--host", "0.0.0.0", *flags)
    assert load("m", "--host", "0.0.0.0", "--insecure", *flags).is_open
    assert not load("m", *flags).is_open  # nobody else can reach it


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tls-cert", "c"), "give --tls-key too"),
        (("--tls-key", "k"), "give --tls-cert too"),
        (("--tls-client-ca", "a"), "give --tls-cert too"),
    ],
)
def test_parts_of_tls_go_together(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load("m", *flags)


def test_bounds_of_the_engine_are_its_own() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        load("m", "--max-batch", "9", "--max-step-tokens", "8").engine_config()
