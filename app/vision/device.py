"""Which device computes: one setting, resolved in one place for training and for prediction."""

import os

import torch

from app.errors import InvalidRequest


class DeviceUnavailable(InvalidRequest):
    code = "device-unavailable"
    title = "The device is not there"


def resolve_device(setting: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises DeviceUnavailable where it is not there.

    `auto` takes the first of cuda, mps, cpu that is present.
    """
    present = present_devices()
    if setting == "auto":
        return torch.device(present[0])
    try:
        device = torch.device(setting)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise DeviceUnavailable(f"GRAFT_DEVICE is {setting!r}; use auto, cpu, cuda, cuda:N or mps.")
    if device.type not in present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceUnavailable(
            f"GRAFT_DEVICE is {setting!r}, but this machine has {', '.join(present)}; set it to auto or one of these."
        )
    return device


def present_devices() -> list[str]:
    """Kinds of device on this machine, fastest first; always ends with "cpu"."""
    return [
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]


def pass_batch_size(device_type: str) -> int:
    """Images of a batch that is only looked at, not trained on.

    On CPUs few: with 64, an early layer's output of mobilenet_v3_small is too large for memory that the C library keeps
    for the next one, and an image takes 4.2 ms in place of the 2.4 that it takes with 32 (two cores).
    """
    return 32 if device_type == "cpu" else 128


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
