"""The program that makes graft_small: by its command, ended and gone on with, and the file that it writes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from app.settings import Settings
from app.vision import backbones
from app.vision.backbones import BACKBONES, BUNDLED, GRAFT_SMALL
from app.vision.weights import WeightStore
from worker.pretraining.bundle import _LASTING, Options, Run, begin_or_go_on, load_backbone, save_backbone
from worker.pretraining.scenes import Bank, Pool

LARGEST_BUNDLE_BYTES = 12 * 1024**2


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.render(textures=8, shapes=5, instances=1, side=80, seed=0)


@pytest.fixture(scope="module")
def pool(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool.on_disk(tmp_path_factory.mktemp("pool"), bank, count=250, side=80, seed=0)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        folder=tmp_path,
        out=tmp_path / "made.safetensors",
        minutes=60.0,
        scenes=250,
        side=80,
        textures=8,
        shapes=5,
        instances=1,
        batch_size=8,
        learning_rate=2e-3,
        seed=0,
        device=torch.device("cpu"),
        start=None,
    )


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(run: Run, count: int) -> None:
    for _ in range(count):
        run._train_step()
        run.step += 1


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(options: Options, pool: Pool, bank: Bank) -> None:
    whole = Run(options, pool, bank.class_counts)
    steps(whole, 4)

    ended = Run(options, pool, bank.class_counts)
    steps(ended, 2)
    ended.save()
    resumed = Run(options, pool, bank.class_counts)
    assert resumed.resume()
    assert resumed.step == 2
    steps(resumed, 2)

    assert same(whole.network.state_dict(), resumed.network.state_dict())
    assert same(whole.average, resumed.average)


def test_there_is_nothing_to_go_on_with_at_first(options: Options, pool: Pool, bank: Bank) -> None:
    assert not Run(options, pool, bank.class_counts).resume()


def test_what_is_written_is_read_back_to_half_precision(tmp_path: Path) -> None:
    made, read = (backbones.build(GRAFT_SMALL, seed=seed) for seed in (1, 2))
    save_backbone(made.state_dict(), tmp_path / "graft_small.safetensors")
    load_backbone(read, tmp_path / "graft_small.safetensors")
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_run_can_begin_from_the_file_alone(options: Options, pool: Pool, bank: Bank) -> None:
    first = backbones.build(GRAFT_SMALL, seed=5)
    save_backbone(first.state_dict(), options.out)
    run = Run(replace(options, start=options.out), pool, bank.class_counts)
    expected = backbones.build(GRAFT_SMALL, seed=0)
    load_backbone(expected, options.out)
    assert same(run.network.backbone.state_dict(), expected.state_dict())


SIZES = {"scenes": 200, "textures": 8, "shapes": 5, "instances": 1, "threads": 1, "minutes": 0.01, "device": "cpu"}


def command(folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    given = [f"--{name}={value}" for name, value in ({"folder": folder} | SIZES | options).items()]
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "pretrain-bundle", *given],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )


@pytest.mark.slow
def test_the_command_trains_writes_the_file_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "graft_small.safetensors"
    first = command(tmp_path)
    assert first.returncode == 0, first.stderr
    rendering, figures, wrote = first.stdout.splitlines()
    assert rendering == "Rendering 8 textures, 5 shapes and 200 scenes."
    assert json.loads(figures)["step"] >= 1
    assert wrote == f"Wrote {out}."
    _, going_on, *_ = command(tmp_path, minutes=0.02).stdout.splitlines()
    assert going_on.startswith(f"Going on from step {json.loads(figures)['step']}")
    # The minutes are over: nothing is trained, and the file is written all the same.
    copy = tmp_path / "elsewhere" / "copy.safetensors"
    assert command(tmp_path, minutes=0.02, out=copy).stdout.splitlines()[-1] == f"Wrote {copy}."
    assert same(safetensors.torch.load_file(copy), safetensors.torch.load_file(out))
    # A server that is given the file takes it in place of the one it came with.
    store = WeightStore.from_settings(Settings(weights_dir=tmp_path, allow_downloads=False))
    found = store.find(GRAFT_SMALL)
    assert found is not None
    assert (found.path, store.availability(GRAFT_SMALL)) == (out, "local")
    backbones.build(GRAFT_SMALL, store.load(found))


def test_a_folder_is_gone_on_with_as_it_was_begun(options: Options) -> None:
    assert begin_or_go_on(options) is None
    assert begin_or_go_on(replace(options, minutes=600.0, out=options.folder / "other")) is None
    for other, begun in (
        ({"scenes": 500}, "--scenes 250"),
        ({"seed": 1}, "--seed 0"),
        ({"textures": 9, "shapes": 6}, "--textures 8, --shapes 5"),
        ({"start": Path("x")}, "no --start"),
    ):
        refused = begin_or_go_on(replace(options, **other))  # type: ignore[arg-type]
        assert refused == (f"{options.folder} was begun with {begun}. Give the same again, or another --folder.")
    # A folder of the first release, which had no choice in these.
    path = options.folder / "options.json"
    begun_with = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in begun_with.items() if k not in ("side", "batch_size", "learning_rate")})
    )
    refused = begin_or_go_on(replace(options, side=96))
    assert refused is not None
    assert "was begun with --side 80, --batch-size 96." in refused
    assert begin_or_go_on(replace(options, batch_size=96)) is None


@pytest.mark.slow
def test_options_that_cannot_be_are_told_in_a_sentence(tmp_path: Path) -> None:
    few = command(tmp_path, scenes=50)
    assert (few.returncode, few.stderr.splitlines()[-1]) == (
        2,
        "graft pretrain-bundle: error: --scenes must be at least the --batch-size",
    )
    (tmp_path / "options.json").write_text(json.dumps(dict.fromkeys(_LASTING, 0)))
    other = command(tmp_path)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith(f"graft pretrain-bundle: {tmp_path} was begun with --scenes 0, ")


def test_the_bundled_file_is_small_whole_and_free_of_a_head() -> None:
    path = BUNDLED / BACKBONES[GRAFT_SMALL].weights[0].file
    assert path.stat().st_size < LARGEST_BUNDLE_BYTES
    tensors = safetensors.torch.load_file(path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not any(name.startswith(BACKBONES[GRAFT_SMALL].head) for name in tensors)
    store = WeightStore.from_settings(Settings(allow_downloads=False))
    found = store.find(GRAFT_SMALL)
    assert found is not None
    built = backbones.build(GRAFT_SMALL, store.load(found)).eval()
    with torch.inference_mode():
        features = built(torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    assert features.isfinite().all()
    assert float(features.std(0).mean()) > 0  # pictures differ in it


def test_a_run_goes_on_on_a_gpu_too(options: Options, pool: Pool, bank: Bank, cuda: torch.device) -> None:
    there = replace(options, device=cuda)
    held = Pool.in_memory(bank.to(cuda), count=250, side=80, seed=0)
    assert (held.pixels.device.type, held.labels.tolist()) == ("cuda", pool.labels.tolist())
    ended = Run(there, held, bank.class_counts)
    steps(ended, 8)  # recorded by then
    ended.save()
    resumed = Run(there, held, bank.class_counts)
    assert resumed.resume()
    steps(resumed, 8)
    steps(ended, 8)
    for name, tensor in ended.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], tensor, rtol=0.05, atol=0.02)
