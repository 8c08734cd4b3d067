"""The Open Inference Protocol's messages of inference, in JSON and with binary data: bytes → tensor, tensor → bytes.

Pure: knows bytes, the value of a header, and numbers; not requests, not models. Whatever the bytes are, `parse` returns
or raises InvalidRequest, and takes memory in proportion to their length.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from app.api.data_urls import bytes_of
from app.api.strict_json import parse_as, strict_json
from app.errors import FieldError, InvalidRequest
from app.vision.images import sniff

# Tensors that every model takes, one or the other, and gives.
ENCODED = "image"  # BYTES [n, 1]
PREPROCESSED = "preprocessed"  # FP32 [n, 3, h, w]
SCORES = "scores"  # FP32 [n, classes]

# A number of JSON takes some 30 bytes of memory; these are 26 pictures of 224 pixels.
MAX_JSON_VALUES = 4_000_000

_LENGTH_BYTES = 4  # before each element of BYTES


@dataclass(frozen=True)
class WantedOutput:
    """The scores in the form that the caller wants them in. classification: so many best classes instead, if any."""

    classification: int
    is_binary: bool


@dataclass(frozen=True)
class Inference:
    """What is asked. tensor: encoded pictures, or preprocessed ones as float32 (n, c, h, w); n > 0."""

    id: str | None
    tensor: list[bytes] | NDArray[np.float32]
    output: WantedOutput


@dataclass(frozen=True)
class OutputTensor:
    """values: floats, or texts for BYTES; row by row, at least one."""

    shape: tuple[int, int]
    values: Sequence[float] | Sequence[str]
    is_binary: bool

    @property
    def datatype(self) -> str:
        return "BYTES" if isinstance(self.values[0], str) else "FP32"


class _Message(BaseModel):
    """Members that are not known here are other extensions' and passed over, as the protocol says."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class InferInputParameters(_Message):
    binary_data_size: Annotated[int, Field(ge=0, description="Bytes of this tensor behind the JSON.")] | None = None
    shared_memory_region: Any = Field(None, description="Not possible here.")


class InferInput(_Message):
    name: str = Field(description=f"{ENCODED}, or {PREPROCESSED}.")
    datatype: str = Field(
        description="BYTES: encoded pictures. FP32: preprocessed ones.", json_schema_extra={"enum": ["BYTES", "FP32"]}
    )
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=8)] = Field(
        description="[n, 1] for BYTES, [n, 3, height, width] for FP32.",
        json_schema_extra={"minItems": 1, "maxItems": 4},
    )
    parameters: InferInputParameters | None = None
    data: list[Any] | None = Field(None, description="Pictures in base64, or numbers; flat or nested.")


class InferOutputParameters(_Message):
    classification: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        None, description="So many best classes, as `score:index:class`, in place of all scores."
    )
    binary_data: bool | None = None


class InferOutput(_Message):
    name: str = Field(description=f"{SCORES}.")
    parameters: InferOutputParameters | None = None


class InferParameters(_Message):
    classification: Annotated[int, Field(ge=0, le=2**31)] | None = None
    binary_data_output: bool | None = None


class InferRequest(_Message):
    """The JSON of POST /v2/models/{name}/infer."""

    id: str | None = Field(None, description="Comes back with the answer.")
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=8)]
    outputs: Annotated[list[InferOutput], Field(max_length=8)] | None = None
    parameters: InferParameters | None = None


def parse(body: bytes, *, header_length: str | None, max_pictures: int, raw_shape: tuple[int, int, int]) -> Inference:
    """header_length: the value of Inference-Header-Content-Length, where there is one; "0" is for a raw tensor.

    raw_shape: of one preprocessed picture, which a raw tensor does not tell.
    Raises InvalidRequest.
    """
    if header_length is None:
        return _parse_message(body, memoryview(b""), max_pictures=max_pictures)
    length = _header_length(header_length, len(body))
    if length == 0:
        return _raw(body, raw_shape, max_pictures=max_pictures)
    return _parse_message(body[:length], memoryview(body)[length:], max_pictures=max_pictures)


def encode(
    output: OutputTensor, *, model_name: str, model_version: str, request_id: str | None
) -> tuple[bytes, int | None]:
    """The answer's body, and its Inference-Header-Content-Length if it has binary data."""
    tensor: dict[str, Any] = {"name": SCORES, "datatype": output.datatype, "shape": list(output.shape)}
    raw = b""
    if output.is_binary:
        raw = _raw_values(output.values)
        tensor["parameters"] = {"binary_data_size": len(raw)}
    else:
        tensor["data"] = list(output.values)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        answer["id"] = request_id
    head = json.dumps(answer | {"outputs": [tensor]}, ensure_ascii=False, allow_nan=False).encode()
    return head + raw, len(head) if output.is_binary else None


# Requests


def _header_length(text: str, body_length: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidRequest("Inference-Header-Content-Length must be a whole number, the length of the JSON in bytes.")
    length = int(text)
    if length > body_length:
        raise InvalidRequest(
            f"Inference-Header-Content-Length says that {length} bytes of JSON come first, but the body has "
            f"{body_length} bytes."
        )
    return length


def _raw(body: bytes, shape: tuple[int, int, int], *, max_pictures: int) -> Inference:
    """One picture, or as many preprocessed ones as it has room for: the first four bytes of a picture would be a
    number beyond 10,000, or below 1e-38, which no normalised tensor begins with."""
    if not body:
        raise InvalidRequest("The body is empty; send a picture, or a tensor.")
    output = WantedOutput(classification=0, is_binary=False)
    picture_bytes = 4 * math.prod(shape)
    if sniff(body[:16]) is not None or len(body) % picture_bytes:
        return Inference(None, [body], output)
    count = len(body) // picture_bytes
    _check_count(count, max_pictures, "#")
    return Inference(None, _numbers_of_bytes(body, (count, *shape)), output)


def _parse_message(head: bytes, tail: memoryview, *, max_pictures: int) -> Inference:
    if sum(head.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise InvalidRequest(
            f"The JSON has more than {MAX_JSON_VALUES:,} values; send tensors of this size as binary data "
            "(Inference-Header-Content-Length), or encoded pictures."
        )
    asked = parse_as(InferRequest, strict_json(head))
    tensor = _tensor(_only_input(asked), tail, max_pictures=max_pictures)
    return Inference(asked.id, tensor, _wanted(asked))


def _only_input(asked: InferRequest) -> InferInput:
    if len(asked.inputs) > 1:
        raise _refusal("#/inputs", f"must be one tensor, {ENCODED} or {PREPROCESSED}; several pictures go into one")
    return asked.inputs[0]


def _tensor(tensor: InferInput, tail: memoryview, *, max_pictures: int) -> list[bytes] | NDArray[np.float32]:
    # The datatype decides, whatever name it comes under: clients call it as the server that they had before did.
    ranks = {"BYTES": (1, 2), "FP32": (4,)}
    if tensor.datatype not in ranks:
        raise _refusal("#/inputs/0/datatype", "must be BYTES (encoded pictures) or FP32 (preprocessed ones)")
    shape = tuple(tensor.shape)
    if len(shape) not in ranks[tensor.datatype] or (tensor.datatype == "BYTES" and shape[1:] not in ((), (1,))):
        raise _refusal("#/inputs/0/shape", "must be [n, 1] for BYTES, [n, 3, height, width] for FP32")
    _check_count(shape[0], max_pictures, "#/inputs/0/shape")
    parameters = tensor.parameters or InferInputParameters()
    if parameters.shared_memory_region is not None:
        raise _refusal("#/inputs/0/parameters", "names shared memory, which this server does not read; send the data")
    if (tensor.data is None) == (parameters.binary_data_size is None):
        raise _refusal("#/inputs/0", "must have either `data` or the parameter `binary_data_size`")
    if (parameters.binary_data_size or 0) != len(tail):
        raise _refusal(
            "#/inputs/0/parameters/binary_data_size",
            f"says {parameters.binary_data_size or 0} bytes, but {len(tail)} bytes come behind the JSON "
            "(whose length Inference-Header-Content-Length tells)",
        )
    if tensor.datatype == "BYTES":
        return _elements(tail, shape[0]) if tensor.data is None else _decoded(tensor.data, shape[0])
    return _numbers_of_bytes(tail, shape) if tensor.data is None else _numbers(tensor.data, shape)


def _wanted(asked: InferRequest) -> WantedOutput:
    outputs = asked.outputs or [InferOutput(name=SCORES)]
    for index, output in enumerate(outputs):
        if output.name != SCORES or index > 0:
            raise _refusal(f"#/outputs/{index}/name", f"must be {SCORES}, and once; there is no other output")
    of_request = asked.parameters or InferParameters()
    of_output = outputs[0].parameters or InferOutputParameters()
    classification = of_request.classification if of_output.classification is None else of_output.classification
    is_binary = of_request.binary_data_output if of_output.binary_data is None else of_output.binary_data
    return WantedOutput(classification=classification or 0, is_binary=bool(is_binary))


def _check_count(count: int, most: int, pointer: str) -> None:
    if not 1 <= count <= most:
        raise _refusal(pointer, f"must be of 1 to {most} pictures, and is of {count}; send several requests")


def _elements(raw: memoryview, count: int) -> list[bytes]:
    """Each has its length before it, little-endian."""
    elements: list[bytes] = []
    start = 0
    for index in range(count):
        end = start + _LENGTH_BYTES
        length = int.from_bytes(raw[start:end], "little")
        if end + length > len(raw):
            raise _refusal(f"#/inputs/0/data/{index}", "is longer than the tensor's binary data")
        elements.append(bytes(raw[end : end + length]))
        start = end + length
    if start != len(raw):
        raise _refusal("#/inputs/0/shape", f"says {count} elements, but the binary data goes on behind them")
    return elements


def _decoded(texts: list[Any], count: int) -> list[bytes]:
    flat = [text[0] if isinstance(text, list) and len(text) == 1 else text for text in texts]
    if len(flat) != count:
        raise _refusal("#/inputs/0/data", f"has {len(flat)} elements, but the shape says {count}")
    return [_element(text, index) for index, text in enumerate(flat)]


def _element(text: Any, index: int) -> bytes:
    try:
        if isinstance(text, str):
            return bytes_of(text)
    except ValueError:
        pass
    raise _refusal(f"#/inputs/0/data/{index}", "must be a picture in base64")


def _numbers_of_bytes(raw: bytes | memoryview, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if 4 * math.prod(shape) != len(raw):
        raise _refusal("#/inputs/0/shape", f"says {4 * math.prod(shape)} bytes, but there are {len(raw)}")
    # Copied: what torch is given has to be writable and aligned.
    return np.frombuffer(raw, dtype="<f4").reshape(shape).astype(np.float32)


def _numbers(values: list[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Flat, or nested to any depth with rows of one length. What is too large for 32 bits becomes infinite."""
    while values and isinstance(values[0], list):
        if not all(isinstance(row, list) and len(row) == len(values[0]) for row in values):
            raise _refusal("#/inputs/0/data", "has rows of different lengths")
        values = list(chain.from_iterable(values))
    # By type and not left to numpy, which would make texts numbers, and one long text as large as all the others.
    if not all(type(value) is float or type(value) is int for value in values):
        raise _refusal("#/inputs/0/data", "must be numbers")
    if len(values) != math.prod(shape):
        raise _refusal("#/inputs/0/data", f"has {len(values)} numbers, but the shape says {math.prod(shape)}")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=np.float64).astype(np.float32).reshape(shape)
    except OverflowError:
        raise _refusal("#/inputs/0/data", "holds an integer that is far too large") from None


def _refusal(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest(
        f"{pointer.removeprefix('#/') or 'the tensor'} {detail}.", errors=[FieldError(pointer, detail)]
    )


# Answers


def _raw_values(values: Sequence[float] | Sequence[str]) -> bytes:
    texts = [value.encode() for value in values if isinstance(value, str)]
    if texts:
        return b"".join(len(text).to_bytes(_LENGTH_BYTES, "little") + text for text in texts)
    return np.asarray(values, dtype="<f4").tobytes()
