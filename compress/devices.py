"""Where calibration is computed: devices by the names that a user gives them."""

import re

import torch

AUTO = "auto"
_NAME = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


def find_devices(text: str) -> tuple[torch.device, ...]:
    """Return the devices that `text` names: `auto` (all CUDA devices, else the CPU), or a list such as cuda:0,cuda:1.

    `cuda` is the first. Raises ValueError for a device that is unknown, not there, or named twice.
    """
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == AUTO:
        return tuple(torch.device("cuda", index) for index in range(num_cuda)) or (torch.device("cpu"),)
    devices: list[torch.device] = []
    for name in text.split(","):
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"device {name!r} is not known; give auto, cpu, cuda, or a list such as cuda:0,cuda:1")
        device = torch.device(name) if name == "cpu" else torch.device("cuda", int(match[1] or 0))
        if device.type == "cuda" and device.index >= num_cuda:
            there = f"it sees {num_cuda} CUDA devices" if num_cuda else "torch sees no CUDA device"
            raise ValueError(f"device {name!r} is not there: {there}; give auto or cpu")
        if device in devices:
            raise ValueError(f"device {name!r} is named twice in {text!r}; name each once")
        devices.append(device)
    return tuple(devices)


def chosen_devices(text: str, *, reads_text: bool) -> tuple[torch.device, ...]:
    """Return the devices for a run; without text to be read all of it is the CPU's, and asking for others is refused.

    Raises ValueError as `find_devices` does.
    """
    cpu = torch.device("cpu")
    if reads_text or text == AUTO:
        return find_devices(text) if reads_text else (cpu,)
    if find_devices(text) != (cpu,):
        raise ValueError(f"device is {text!r}, but no pass reads text, and the rest runs on the CPU; leave it out")
    return (cpu,)
