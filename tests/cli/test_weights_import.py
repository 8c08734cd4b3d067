"""Weights from elsewhere: what a backbone has is taken whole, whatever else a file holds is refused with a sentence."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision.models
from scripted_server import Result
from torch import Tensor

from app.cli.terminal import Failure
from app.cli.weights import check
from app.errors import WeightsRefused
from app.settings import Settings
from app.vision import backbones
from app.vision.backbones import BACKBONES
from app.vision.weight_import import read
from app.vision.weights import WeightStore

Graft = Callable[..., Result]
NAME = "squeezenet1_1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def state_dict() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return dict(torchvision.models.squeezenet1_1(weights=None).state_dict())


def saved(tensors: Any, path: Path, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, **options)
    return path


def safetensors_file(path: Path, header: Any, content: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)
    return path


def refusal(graft: Graft, file: Path, *, backbone: str = NAME) -> str:
    """What the command says; and nothing has come to be."""
    result = graft("weights", "import", str(file), "--backbone", backbone)
    assert (result.exit_code, result.output) == (1, "")
    folder = Path(os.environ["GRAFT_WEIGHTS_DIR"])
    assert not folder.exists() or list(folder.iterdir()) == []
    return result.errors


def told(file: Path) -> str:
    """What reading it raises; in this process, since what these files hold is not dangerous."""
    with pytest.raises(WeightsRefused) as refused:
        read(file, NAME, max_bytes=2**30)
    return refused.value.detail


# What is taken


@pytest.mark.parametrize(
    "name",
    ["theirs.safetensors", *(pytest.param(other, marks=pytest.mark.slow) for other in ("theirs.pth", "old.pth"))],
)
def test_a_good_file_is_taken_and_used(
    graft: Graft, tmp_path: Path, folder: Path, state_dict: dict[str, Tensor], name: str
) -> None:
    options = {"_use_new_zipfile_serialization": False} if name == "old.pth" else {}
    file = saved(state_dict, tmp_path / name, **options)

    result = graft("weights", "import", str(file), "--backbone", NAME)

    target = folder / f"{NAME}.safetensors"
    assert (result.exit_code, result.errors) == (0, "")
    assert result.output == f"{hashlib.sha256(target.read_bytes()).hexdigest()}  {target}\n"
    assert [path.name for path in folder.iterdir()] == [target.name]
    store = WeightStore.from_settings(Settings(weights_dir=folder, data_dir=tmp_path / "data", allow_downloads=False))
    found = store.load(store.obtain(NAME))
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], state_dict[name]) for name in found)


@pytest.mark.slow
def test_a_file_without_its_last_layer_in_half_precision_is_taken(
    graft: Graft, tmp_path: Path, folder: Path, state_dict: dict[str, Tensor]
) -> None:
    head = BACKBONES[NAME].head
    halved = {name: t.half() for name, t in state_dict.items() if not name.startswith(f"{head}.")}

    result = graft("weights", "import", str(saved(halved, tmp_path / "half.safetensors")), "--backbone", NAME)

    assert (result.exit_code, result.errors) == (0, "")
    store = WeightStore.from_settings(Settings(weights_dir=folder, data_dir=tmp_path / "data", allow_downloads=False))
    built = backbones.build(NAME, store.load(store.obtain(NAME)))
    expected = {name: tensor.float() for name, tensor in halved.items()}
    assert all(any(torch.equal(tensor, other) for other in built.state_dict().values()) for tensor in expected.values())


@pytest.mark.slow
def test_a_file_that_is_there_is_replaced_only_by_force(
    graft: Graft, tmp_path: Path, folder: Path, state_dict: dict[str, Tensor]
) -> None:
    file = saved(state_dict, tmp_path / "theirs.safetensors")
    folder.mkdir()
    target = folder / f"{NAME}.safetensors"
    target.write_bytes(b"mine")

    kept = graft("weights", "import", str(file), "--backbone", NAME)
    assert (kept.exit_code, kept.errors) == (1, f"{target} is there already; --force replaces it.\n")
    assert target.read_bytes() == b"mine"

    assert graft("weights", "import", str(file), "--backbone", NAME, "--force").exit_code == 0
    assert safetensors.torch.load_file(target).keys() == state_dict.keys()


@pytest.mark.slow
def test_a_link_in_the_folder_is_replaced_and_not_followed(
    graft: Graft, tmp_path: Path, folder: Path, state_dict: dict[str, Tensor]
) -> None:
    file = saved(state_dict, tmp_path / "theirs.safetensors")
    folder.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    target = folder / f"{NAME}.safetensors"
    target.symlink_to(tmp_path / "elsewhere")

    assert graft("weights", "import", str(file), "--backbone", NAME).exit_code == 1
    assert graft("weights", "import", str(file), "--backbone", NAME, "--force").exit_code == 0

    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert not target.is_symlink()


# What is refused


def test_without_a_folder_the_setting_is_named(graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_WEIGHTS_DIR")
    (tmp_path / "any.pth").touch()

    result = graft("weights", "import", str(tmp_path / "any.pth"), "--backbone", NAME)

    assert result.exit_code == 1
    assert "GRAFT_WEIGHTS_DIR" in result.errors


def test_an_unknown_backbone_is_told_with_those_that_there_are(graft: Graft, tmp_path: Path) -> None:
    (tmp_path / "any.pth").touch()
    assert "there are: resnet18" in refusal(graft, tmp_path / "any.pth", backbone="resnet17")
    assert "no backbone of this name" in refusal(graft, tmp_path / "any.pth", backbone="../resnet18")


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("is_old", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_in_a_pickle_is_not_run(
    graft: Graft, tmp_path: Path, state_dict: dict[str, Tensor], is_old: bool
) -> None:
    mark = tmp_path / "harm"
    file = saved(state_dict | {"more": Harm(mark)}, tmp_path / "harm.pth", _use_new_zipfile_serialization=not is_old)

    assert "other things than tensors, which are never loaded" in refusal(graft, file)

    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.slow
def test_a_bare_pickle_is_refused(graft: Graft, tmp_path: Path) -> None:
    file = tmp_path / "bare.pth"
    file.write_bytes(pickle.dumps(Harm(tmp_path / "harm")))

    assert "not a file of torch.save" in refusal(graft, file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_a_zip_bomb_is_refused_before_it_is_unpacked(graft: Graft, tmp_path: Path) -> None:
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb/data/0", "w") as member:
        for _ in range(1000):
            member.write(bytes(1024**2))

    assert file.stat().st_size < 2 * 1024**2
    assert "unpacks to more than it has" in refusal(graft, file)


@pytest.mark.slow
def test_a_storage_of_a_tebibyte_meets_the_limit_of_memory(graft: Graft, tmp_path: Path) -> None:
    """Files of before torch 1.6 state sizes that are allocated before a byte of them is read."""
    file = tmp_path / "vast.pth"
    size = 2**38
    # A pickle by hand, since there is no such storage to save: a table of one tensor in it.
    storage = (
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + pickle.LONG1
        + bytes([8])
        + size.to_bytes(8, "little")
        + b"NtQ"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\x00K\x01\x85K\x01\x85\x89}tR"
    body = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    numbers = [pickle.dumps(value, 2) for value in (torch.serialization.MAGIC_NUMBER, 1001, system)]
    file.write_bytes(b"".join(numbers) + body + pickle.dumps(["0"], 2))

    assert "takes more memory than its backbone has weights" in refusal(graft, file)


def test_a_huge_header_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * (2 * 1024**2)
    assert "header has 2,097,206 bytes" in told(safetensors_file(tmp_path / "a.safetensors", header, bytes(4)))


def test_a_header_that_is_said_to_be_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "cut off" in told(file)


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("header", "content", "sentence"),
    [
        ({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), "overlap"),
        ({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [0, 8]}}, bytes(8), "overlap"),
        ({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16), "leave bytes between"),
        ({"a": F32 | {"data_offsets": [0, 8]}}, bytes(12), "bytes behind its tensors"),
        ({"a": F32 | {"data_offsets": [0, 8]}}, bytes(4), "cut off"),
        ({"a": F32 | {"data_offsets": [0, 4]}}, bytes(4), "other bytes than its shape says"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b"", "other bytes than its shape says"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"", "does not describe"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"1", "of the kind 'U8'"),
        ({"a\x1b[31m": 3}, b"", "does not describe 'a?[31m'"),
        ([], b"", "not a table of tensors"),
        (b'{"a": 1, "a": 2}', b"", "names something twice"),
        (b"[" * 100_000, b"", "not JSON"),
        ({}, b"", "the file lacks 'classifier.1.bias'"),
    ],
)
def test_a_wrong_header_is_refused_with_what_is_wrong(
    tmp_path: Path, header: Any, content: bytes, sentence: str
) -> None:
    if header == {}:
        header = {BACKBONES[NAME].head + ".weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    assert sentence in told(safetensors_file(tmp_path / "a.safetensors", header, content))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_that_are_not_the_backbones_are_refused(
    tmp_path: Path, state_dict: dict[str, Tensor], ending: str
) -> None:
    first = "features.0.weight"
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "shape": (state_dict | {first: torch.zeros(64, 3, 3, 2)}, "has the shape [64, 3, 3, 2], not [64, 3, 3, 3]"),
        "nan": (state_dict | {first: torch.full((64, 3, 3, 3), float("nan"))}, "not finite numbers"),
        "infinite in single": (
            state_dict | {first: torch.full((64, 3, 3, 3), 1e300, dtype=torch.float64)},
            "not finite numbers",
        ),
        "kind": (state_dict | {first: torch.zeros(64, 3, 3, 3, dtype=torch.int64)}, "no floating-point numbers"),
        "more": (state_dict | {"more": torch.zeros(1)}, "has 'more', which squeezenet1_1 has not"),
        "less": ({k: v for k, v in state_dict.items() if k != first}, f"lacks '{first}'"),
        "half a head": ({k: v for k, v in state_dict.items() if k != "classifier.1.bias"}, "lacks 'classifier.1.bias'"),
    }
    for name, (tensors, sentence) in wrong.items():
        assert sentence in told(saved(tensors, tmp_path / f"{name}.{ending}"))


def test_what_is_not_a_flat_table_of_dense_tensors_is_refused(tmp_path: Path, state_dict: dict[str, Tensor]) -> None:
    first = "features.0.weight"
    wrong: dict[str, tuple[Any, str]] = {
        "nested": ({"state_dict": state_dict, "epoch": 3}, "'state_dict' is no tensor"),
        "list": (list(state_dict.values()), "no table of tensors by name"),
        "numbered": ({1: torch.zeros(1)}, "no table of tensors by name"),
        "meta": (state_dict | {first: state_dict[first].to("meta")}, "not a dense tensor"),
    }
    for name, (value, sentence) in wrong.items():
        assert sentence in told(saved(value, tmp_path / f"{name}.pth"))


@pytest.mark.slow
def test_a_sparse_tensor_is_refused(graft: Graft, tmp_path: Path, state_dict: dict[str, Tensor]) -> None:
    sparse = {"features.0.weight": state_dict["features.0.weight"].to_sparse()}
    assert "not a dense tensor" in refusal(graft, saved(state_dict | sparse, tmp_path / "sparse.pth"))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_a_cut_off_file_is_refused(tmp_path: Path, state_dict: dict[str, Tensor], ending: str, kept: float) -> None:
    file = saved(state_dict, tmp_path / f"cut.{ending}")
    size = file.stat().st_size
    os.truncate(file, kept if isinstance(kept, int) else int(size * kept))

    assert "cut off" in told(file)


def test_what_is_not_a_file_is_refused(tmp_path: Path, state_dict: dict[str, Tensor]) -> None:
    file = saved(state_dict, tmp_path / "theirs.safetensors")
    (tmp_path / "link.safetensors").symlink_to(file)
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "other.bin").touch()

    assert "is a link" in told(tmp_path / "link.safetensors")
    assert "not a file" in told(tmp_path / "folder.pth")
    assert "not a file" in told(tmp_path / "pipe.pth")
    assert "end in .safetensors or .pth" in told(tmp_path / "other.bin")
    assert "No such file" in told(tmp_path / "none.pth")


@pytest.mark.slow
def test_a_file_larger_than_any_weights_of_it_is_not_read(graft: Graft, tmp_path: Path) -> None:
    file = tmp_path / "vast.safetensors"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # of holes

    assert "1,099,511,627,776 bytes" in refusal(graft, file)


def test_reading_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    """A pickle of two-byte steps that take no memory and, all together, most of a minute."""
    file = tmp_path / "slow.pth"
    numbers = [pickle.dumps(value, 2) for value in (torch.serialization.MAGIC_NUMBER, 1001, {})]
    file.write_bytes(b"".join(numbers) + b"\x80\x02]" + b"(e" * 30_000_000 + b".")

    with pytest.raises(Failure, match="longer than 5 s"):
        check(file, NAME, tmp_path / "target", longest_seconds=5)

    assert not (tmp_path / "target").exists()


@pytest.mark.slow
def test_a_buffer_that_is_no_zip_any_more_is_refused(
    graft: Graft, tmp_path: Path, state_dict: dict[str, Tensor]
) -> None:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    content = bytearray(buffer.getvalue())
    content[: len(content) // 3] = os.urandom(len(content) // 3)
    file = tmp_path / "torn.pth"
    file.write_bytes(bytes(content))

    assert "damaged" in refusal(graft, file)
