"""The wire format of /v2 by itself: what is read, what is refused, and that no bytes do anything else."""

import base64
import json
import struct
import time
from typing import Any

import builders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.open_inference_wire import Inference, OutputTensor, WantedOutput, encode, parse
from app.errors import InvalidRequest

SHAPE = (3, 4, 4)
PICTURE = builders.jpeg(1)
NUMBERS = np.arange(96, dtype="<f4").reshape(2, 3, 4, 4)


def read(body: bytes, header_length: str | None = None) -> Inference:
    return parse(body, header_length=header_length, max_pictures=4, raw_shape=SHAPE)


def message(**changes: Any) -> dict[str, Any]:
    """One picture in JSON, with members of its input changed; those that are None are left out."""
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [text_of(PICTURE)], **changes}
    return {"inputs": [{name: value for name, value in tensor.items() if value is not None}]}


def in_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def binary(raw: bytes, **changes: Any) -> tuple[bytes, str]:
    """Body and header of a message whose tensor comes behind the JSON."""
    head = in_json(message(data=None, parameters={"binary_data_size": len(raw)}, **changes))
    return head + raw, str(len(head))


def elements(*contents: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(content)) + content for content in contents)


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def numbers_of(asked: Inference) -> Any:
    assert isinstance(asked.tensor, np.ndarray)
    assert (asked.tensor.dtype, asked.tensor.flags.writeable) == (np.float32, True)
    return asked.tensor


@pytest.mark.parametrize("shape", [[2], [2, 1]])
@pytest.mark.parametrize(
    "data", [[text_of(PICTURE), text_of(b"x")], [[f"data:image/jpeg;base64,{text_of(PICTURE)}"], [text_of(b"x")]]]
)
def test_encoded_pictures_in_json(shape: list[int], data: list[Any]) -> None:
    asked = read(in_json(message(shape=shape, data=data)))

    assert asked == Inference(None, [PICTURE, b"x"], WantedOutput(classification=0, is_binary=False))


def test_encoded_pictures_in_binary() -> None:
    assert read(*binary(elements(PICTURE, b"", b"x"), shape=[3, 1])).tensor == [PICTURE, b"", b"x"]


def test_preprocessed_pictures_in_binary() -> None:
    asked = read(*binary(NUMBERS.tobytes(), name="preprocessed", datatype="FP32", shape=[2, 3, 4, 4]))

    assert np.array_equal(numbers_of(asked), NUMBERS)


@pytest.mark.parametrize("data", [NUMBERS.tolist(), NUMBERS.flatten().tolist(), NUMBERS.astype(int).tolist()])
def test_preprocessed_pictures_in_json_flat_or_nested(data: list[Any]) -> None:
    asked = read(in_json(message(name="preprocessed", datatype="FP32", shape=[2, 3, 4, 4], data=data)))

    assert np.array_equal(numbers_of(asked), NUMBERS)


def test_number_beyond_32_bits_becomes_infinite_and_is_for_the_model_to_refuse() -> None:
    asked = read(in_json(message(name="preprocessed", datatype="FP32", shape=[1, 1, 1, 1], data=[1e300])))

    assert numbers_of(asked).tolist() == [[[[float("inf")]]]]


def test_header_of_0_is_for_a_picture_or_a_tensor_as_it_is() -> None:
    assert read(PICTURE, "0").tensor == [PICTURE]
    assert np.array_equal(numbers_of(read(NUMBERS.tobytes(), "0")), NUMBERS)
    assert read(b"neither", "0").tensor == [b"neither"]


@pytest.mark.parametrize(
    ("of_request", "of_output", "wanted"),
    [
        ({}, None, WantedOutput(0, is_binary=False)),
        ({"binary_data_output": True}, None, WantedOutput(0, is_binary=True)),
        ({"binary_data_output": True}, {"binary_data": False}, WantedOutput(0, is_binary=False)),
        ({}, {"binary_data": True, "classification": 2}, WantedOutput(2, is_binary=True)),
        ({"classification": 3}, {}, WantedOutput(3, is_binary=False)),
        ({"timeout": 5, "anything": [{}]}, {"else": 1}, WantedOutput(0, is_binary=False)),
    ],
)
def test_output_is_as_the_request_and_then_the_output_says(
    of_request: dict[str, Any], of_output: dict[str, Any] | None, wanted: WantedOutput
) -> None:
    outputs = None if of_output is None else [{"name": "scores", "parameters": of_output}]
    asked = read(in_json({**message(), "id": "42", "parameters": of_request, "outputs": outputs, "more": 1}))

    assert (asked.id, asked.output) == ("42", wanted)


@pytest.mark.parametrize(
    ("content", "pointer"),
    [
        ({}, "#/inputs"),
        ({"inputs": []}, "#/inputs"),
        ({"inputs": {}}, "#/inputs"),
        ({"inputs": message()["inputs"] * 2}, "#/inputs"),
        ({"inputs": message()["inputs"] * 9}, "#/inputs"),
        ({**message(), "id": 42}, "#/id"),
        ({**message(), "outputs": [{"name": "labels"}]}, "#/outputs/0/name"),
        ({**message(), "outputs": [{"name": "scores"}] * 2}, "#/outputs/1/name"),
        ({**message(), "outputs": [{"name": "scores", "parameters": {"classification": -1}}]},
         "#/outputs/0/parameters/classification"),
        (message(datatype="UINT8"), "#/inputs/0/datatype"),
        (message(shape=[1, 2]), "#/inputs/0/shape"),
        (message(shape=[]), "#/inputs/0/shape"),
        (message(shape=[1] * 9), "#/inputs/0/shape"),
        (message(shape=[0, 1]), "#/inputs/0/shape"),
        (message(shape=[5, 1]), "#/inputs/0/shape"),
        (message(shape=[2**70, 1]), "#/inputs/0/shape/0"),
        (message(shape=[-1, 1]), "#/inputs/0/shape/0"),
        (message(shape=[True, 1]), "#/inputs/0/shape/0"),
        (message(shape=[1.0, 1]), "#/inputs/0/shape/0"),
        (message(data=None), "#/inputs/0"),
        (message(data=text_of(PICTURE)), "#/inputs/0/data"),
        (message(data=[]), "#/inputs/0/data"),
        (message(data=["AAAA", "AAAA"]), "#/inputs/0/data"),
        (message(data=["*"]), "#/inputs/0/data/0"),
        (message(data=[7]), "#/inputs/0/data/0"),
        (message(data=[["AAAA", "AAAA"]]), "#/inputs/0/data/0"),
        (message(shape=[2, 1], data=["AAAA", "é"]), "#/inputs/0/data/1"),
        (message(parameters={"binary_data_size": 4}), "#/inputs/0"),
        (message(data=None, parameters={"binary_data_size": 4}), "#/inputs/0/parameters/binary_data_size"),
        (message(data=None, parameters={"binary_data_size": -4}), "#/inputs/0/parameters/binary_data_size"),
        (message(parameters={"shared_memory_region": "r"}), "#/inputs/0/parameters"),
        (message(datatype="FP32", data=[1.0]), "#/inputs/0/shape"),
        (message(datatype="FP32", shape=[1, 1, 1, 2], data=[1.0]), "#/inputs/0/data"),
        (message(datatype="FP32", shape=[1, 1, 2, 2], data=[[1, 2, 3], [4]]), "#/inputs/0/data"),
        (message(datatype="FP32", shape=[1, 1, 1, 2], data=[1.0, "2"]), "#/inputs/0/data"),
        (message(datatype="FP32", shape=[1, 1, 1, 1], data=[True]), "#/inputs/0/data"),
        (message(datatype="FP32", shape=[1, 1, 1, 2], data=["long" * 10, "2"]), "#/inputs/0/data"),
        (message(datatype="FP32", shape=[1, 1, 1, 1], data=[10**400]), "#/inputs/0/data"),
    ],
)  # fmt: skip
def test_message_that_is_wrong_is_pointed_at(content: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(in_json(content))

    assert [error.pointer for error in refused.value.errors] == [pointer]


@pytest.mark.parametrize(
    ("raw", "shape", "pointer"),
    [
        (elements(PICTURE)[:-1], [1, 1], "#/inputs/0/data/0"),
        (elements(PICTURE) + b"x", [1, 1], "#/inputs/0/shape"),
        (elements(PICTURE), [2, 1], "#/inputs/0/data/1"),
        (b"\xff\xff\xff\xff", [1, 1], "#/inputs/0/data/0"),
        (b"\x00\x00", [1, 1], "#/inputs/0/data/0"),
        (b"", [1, 1], "#/inputs/0/data/0"),
    ],
)
def test_elements_whose_lengths_lie_are_pointed_at(raw: bytes, shape: list[int], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(*binary(raw, shape=shape))

    assert [error.pointer for error in refused.value.errors] == [pointer]


def test_tensor_of_another_size_than_its_shape_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="says 384 bytes, but there are 380"):
        read(*binary(NUMBERS.tobytes()[4:], datatype="FP32", shape=[2, 3, 4, 4]))


@pytest.mark.parametrize("header_length", ["-1", "1e3", "", " 5", "٣", "9" * 30, "1000000", "0x10", "5, 5"])
def test_header_that_lies_is_refused(header_length: str) -> None:
    with pytest.raises(InvalidRequest):
        read(in_json(message()), header_length)


@pytest.mark.parametrize("claimed", [-1, 1])
def test_binary_size_that_lies_is_refused(claimed: int) -> None:
    body, header_length = binary(elements(PICTURE))
    size = len(elements(PICTURE))
    body = body.replace(f'"binary_data_size": {size}'.encode(), f'"binary_data_size": {size + claimed}'.encode())

    with pytest.raises(InvalidRequest, match=f"says {size + claimed} bytes, but {size} bytes come"):
        read(body, header_length)


@pytest.mark.parametrize("header_length", [None, "0"])
def test_empty_body_is_refused(header_length: str | None) -> None:
    with pytest.raises(InvalidRequest):
        read(b"", header_length)


def test_json_of_too_many_values_is_refused_before_it_is_read() -> None:
    began = time.perf_counter()

    with pytest.raises(InvalidRequest, match="send tensors of this size as binary data"):
        read(b'{"inputs": [' + b"[]," * 4_000_000 + b"[]]}")

    assert time.perf_counter() - began < 1.0


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=400), header_length=st.none() | st.integers(0, 400).map(str) | st.text(max_size=5))
def test_arbitrary_bytes_are_read_or_refused(body: bytes, header_length: str | None) -> None:
    assert_read_or_refused(body, header_length)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("AAAA"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from(["image", "preprocessed"]) | JSON, "datatype": st.sampled_from(["BYTES", "FP32"]) | JSON},
    optional={
        "shape": st.lists(st.integers(-1, 5), max_size=5) | JSON,
        "data": st.lists(st.floats() | st.just("AAAA"), max_size=5) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 50)}) | JSON,
    },
)
MESSAGE = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, min_size=1, max_size=2) | JSON},
    optional={"id": JSON, "outputs": st.lists(JSON, max_size=2), "parameters": JSON},
)


@settings(max_examples=500, deadline=None)
@given(content=MESSAGE, tail=st.binary(max_size=50), is_honest=st.booleans(), lie=st.integers(-20, 20))
def test_messages_that_nearly_fit_are_read_or_refused(
    content: dict[str, Any], tail: bytes, is_honest: bool, lie: int
) -> None:
    head = in_json(content)

    assert_read_or_refused(head + tail, str(len(head) if is_honest else max(0, len(head) + lie)))
    assert_read_or_refused(head, None)


def assert_read_or_refused(body: bytes, header_length: str | None) -> None:
    try:
        asked = read(body, header_length)
    except InvalidRequest as refusal:
        assert (refusal.status, bool(refusal.detail)) == (422, True)
    else:
        assert 1 <= len(asked.tensor) <= 4


def test_answer_in_json() -> None:
    body, header_length = encode(
        OutputTensor(shape=(1, 2), values=[0.25, 0.75], is_binary=False),
        model_name="pets",
        model_version="mdl_1",
        request_id="42",
    )

    assert header_length is None
    assert json.loads(body) == {
        "model_name": "pets",
        "model_version": "mdl_1",
        "id": "42",
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.75]}],
    }


@pytest.mark.parametrize(
    ("values", "datatype", "raw"),
    [
        ([0.25, 0.75], "FP32", struct.pack("<2f", 0.25, 0.75)),
        (["0.75:1:é", "0.25:0:x"], "BYTES", elements("0.75:1:é".encode(), b"0.25:0:x")),
    ],
)
def test_answer_with_binary_data(values: list[Any], datatype: str, raw: bytes) -> None:
    output = OutputTensor(shape=(1, 2), values=values, is_binary=True)
    body, header_length = encode(output, model_name="é", model_version="mdl_1", request_id=None)

    assert header_length is not None
    assert body[header_length:] == raw
    [tensor] = json.loads(body[:header_length])["outputs"]
    assert (tensor["datatype"], tensor["parameters"]) == (datatype, {"binary_data_size": len(raw)})
    assert "data" not in tensor
