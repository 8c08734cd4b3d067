"""A weight file from strangers → a state dict that may be used: names, shapes and numbers are a backbone's, or it is
refused with a sentence. Run as a program, which confines itself before it opens the file; `graft weights import` does.

Knows files and networks; not where weights belong. Reads one line of JSON on standard input, {"path", "backbone",
"target"}, writes the target, and one line of JSON on standard output: {"tensors": N} or {"refused": SENTENCE}.
"""

import json
import os
import pickletools
import re
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from app.confinement import confine
from app.errors import InvalidRequest, WeightsRefused
from app.vision.backbones import find, hollow
from app.vision.weights import OLD_DENSENET_KEY

# Names of the largest network's tensors, with shapes and offsets, take a fifth of this.
MAX_HEADER_BYTES = 1024**2
# Beside the tensors: what reading and checking needs.
SPARE_BYTES = 256 * 1024**2
# A minute of two processors; the largest network takes seconds.
CPU_SECONDS = 120

# Batch norm's counters came to torch in version 0.4.1; nothing here reads them.
_COUNTER = ".num_batches_tracked"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAFETENSORS_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}


def main() -> int:
    order = json.loads(sys.stdin.readline())
    try:
        backbone = find(order["backbone"]).name
        size_bytes = sum(tensor.numel() * 8 for tensor in _expected(backbone).values())  # in double precision
        # The file's own bytes, the tensors in single precision, and both at once while they are changed.
        confine(more_bytes=4 * size_bytes + SPARE_BYTES, cpu_seconds=CPU_SECONDS)
        tensors = read(Path(order["path"]), backbone, max_bytes=2 * size_bytes + SPARE_BYTES // 4)
    except InvalidRequest as refusal:
        answer: dict[str, Any] = {"refused": refusal.detail}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        answer = {
            "refused": "Reading the file takes more memory than its backbone has weights: it is not what it says."
        }
    else:
        Path(order["target"]).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        answer = {"tensors": len(tensors)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def read(path: Path, backbone: str, *, max_bytes: int) -> dict[str, Tensor]:
    """The file's tensors, float32 but for counters, by exactly the names that the backbone has for them.

    The last layer, of ImageNet's classes, may be missing. Raises WeightsRefused, and what the limits of memory raise.
    """
    with _opened(path, max_bytes=max_bytes) as file:
        found = _read_safetensors(file) if path.suffix == ".safetensors" else _read_pickle(file)
    return _checked(found, backbone)


def _opened(path: Path, *, max_bytes: int) -> BinaryIO:
    if path.suffix not in (".safetensors", ".pth"):
        raise WeightsRefused("Weights are read from files that end in .safetensors or .pth.")
    try:
        # No link, and no pipe that would be waited for: what is looked at is what is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise WeightsRefused("The file is a link; name the file that it points at.") from error
        raise WeightsRefused(f"The file cannot be read: {error.strerror}.") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise WeightsRefused("This is not a file.")
    if found.st_size > max_bytes:
        os.close(descriptor)
        raise WeightsRefused(
            f"The file has {found.st_size:,} bytes, more than this backbone's weights can take; save these alone."
        )
    return os.fdopen(descriptor, "rb")


# .safetensors


def _read_safetensors(file: BinaryIO) -> dict[str, Any]:
    """Each byte belongs to one tensor: nothing overlaps, nothing is between. Source: the format's README."""
    encoded = file.read()
    header_bytes = int.from_bytes(encoded[:8], "little")
    if len(encoded) < 8 or header_bytes > len(encoded) - 8:
        raise WeightsRefused("The file is cut off, or not a safetensors file.")
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightsRefused(f"The file's header has {header_bytes:,} bytes; {MAX_HEADER_BYTES:,} are read.")
    try:
        header = json.loads(encoded[8 : 8 + header_bytes], object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise WeightsRefused("The file's header is not JSON, or names something twice.") from error
    if not isinstance(header, dict):
        raise WeightsRefused("The file's header is not a table of tensors.")
    header.pop("__metadata__", None)
    _check_extents(header, len(encoded) - 8 - header_bytes)
    try:
        return dict(safetensors.torch.load(encoded))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise WeightsRefused("The file is damaged, or not a safetensors file.") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name twice")
    return table


def _check_extents(header: Mapping[str, Any], data_bytes: int) -> None:
    extents = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
                type(side) is int and side >= 0 for side in shape
            ):
                count = 1
                for side in shape:
                    count *= side
                if kind not in _SAFETENSORS_BYTES:
                    raise WeightsRefused(f"{_shown(name)} is of the kind {_shown(kind)}, which is not read.")
                if end - start != count * _SAFETENSORS_BYTES[kind]:
                    raise WeightsRefused(f"{_shown(name)} has other bytes than its shape says.")
                extents.append((start, end))
            case _:
                raise WeightsRefused(f"The file's header does not describe {_shown(name)} as a tensor.")
    position = 0
    for start, end in sorted(extents):
        if start != position:
            raise WeightsRefused("Tensors of the file overlap, or leave bytes between them.")
        position = end
    if position != data_bytes:
        what = "is cut off" if position > data_bytes else "has bytes behind its tensors"
        raise WeightsRefused(f"The file {what}.")


# .pth


def _read_pickle(file: BinaryIO) -> Any:
    if zipfile.is_zipfile(file):
        _check_zip(file)
    else:
        _check_old_format(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # whatever a hostile file makes of the reader is a refusal
        if "allocate memory" in str(error):
            raise
        raise WeightsRefused(
            "The file is damaged, or holds other things than tensors, which are never loaded: they may be programs. "
            "Save the state dict alone, best as .safetensors."
        ) from error


def _check_zip(file: BinaryIO) -> None:
    """torch.save compresses nothing, so what unpacks to more than the file has was not made by it."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise WeightsRefused("The file is cut off or damaged.") from error
    size_bytes = file.seek(0, os.SEEK_END)
    is_packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_packed or sum(member.file_size for member in members) > size_bytes:
        raise WeightsRefused("The file is an archive that unpacks to more than it has; torch.save makes none such.")


def _check_old_format(file: BinaryIO) -> None:
    """Files from before torch 1.6 are pickles one after the other, which begin with a number of torch's own."""
    file.seek(0)
    try:
        first = next(arg for op, arg, _ in pickletools.genops(file.read(64)) if op.name.startswith("LONG"))
    except (ValueError, StopIteration, IndexError, TypeError, EOFError) as error:
        raise WeightsRefused("The file is cut off, or not a file of torch.save.") from error
    if first != torch.serialization.MAGIC_NUMBER:
        raise WeightsRefused("The file is not a file of torch.save.")


# What was read


def _checked(found: Any, backbone: str) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise WeightsRefused("The file holds no table of tensors by name; save the network's state_dict() alone.")
    nested = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if nested:
        raise WeightsRefused(
            f"{_shown(nested[0])} is no tensor: the file holds more than a state dict. Save the state dict alone."
        )
    tensors = {OLD_DENSENET_KEY.sub(r"\1\2", name): tensor for name, tensor in found.items()}
    expected = _expected(backbone)
    head = {f"{find(backbone).head}.{part}" for part in ("weight", "bias")}
    is_headless = not head & tensors.keys()
    wanted = {name for name in expected if not (is_headless and name in head)}
    missing = sorted(name for name in wanted - tensors.keys() if not name.endswith(_COUNTER))
    unknown = sorted(tensors.keys() - wanted)
    if missing or unknown:
        what = f"lacks {_shown(missing[0])}" if missing else f"has {_shown(unknown[0])}, which {backbone} has not"
        more = len(missing) + len(unknown) - 1
        others = f", and {more} other names differ" if more else ""
        raise WeightsRefused(f"These are not the weights of torchvision's {backbone}: the file {what}{others}.")
    return {
        name: _one(name, tensors[name], like=expected[name])
        if name in tensors
        else torch.zeros(expected[name].shape, dtype=expected[name].dtype)
        for name in sorted(wanted)
    }


def _one(name: str, tensor: Tensor, *, like: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise WeightsRefused(f"{_shown(name)} is not a dense tensor.")
    if tensor.shape != like.shape:
        raise WeightsRefused(f"{_shown(name)} has the shape {list(tensor.shape)}, not {list(like.shape)}.")
    if like.is_floating_point():
        if tensor.dtype not in _FLOATS:
            raise WeightsRefused(f"{_shown(name)} holds no floating-point numbers.")
        tensor = tensor.detach().float()
        if not torch.isfinite(tensor).all():
            raise WeightsRefused(f"{_shown(name)} holds values that are not finite numbers.")
    elif tensor.dtype != like.dtype:
        raise WeightsRefused(f"{_shown(name)} holds no whole numbers of 64 bits.")
    # A copy, since a tensor of a few bytes may be one view of a large storage, or several of the same.
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _expected(backbone: str) -> dict[str, Tensor]:
    return dict(hollow(backbone).state_dict())


def _shown(text: str) -> str:
    """A name out of the file, for a sentence on a terminal: no control characters, not long."""
    printable = re.sub(r"[^\x20-\x7e]", "?", text)
    return f"'{printable[:80]}'"


if __name__ == "__main__":
    sys.exit(main())
