from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.datasets.manifest import Split
from worker import quality
from worker.quality import near_pairs, quality_warnings, suspicious_labels


def pictures(
    count: int, classes: int, *, width: int = 128, distance: float = 0.6, seed: int = 0
) -> tuple[Tensor, NDArray[np.int64]]:
    """Features of pictures that resemble others of their class, as a pretrained network would give them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = distance * torch.randn(classes, width, generator=generator)
    return torch.randn(count, width, generator=generator) + centres[labels], labels.numpy().astype(np.int64)


def copy_of(features: Tensor, index: int) -> Tensor:
    return features[index] + 0.2 * torch.randn(features.shape[1], generator=torch.Generator().manual_seed(index))


def warnings_of(
    features: Tensor,
    labels: NDArray[np.int64],
    *,
    splits: dict[int, Split] | None = None,
    copies: dict[int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """By code. All pictures are in train and alone, but for those that are named."""
    count = len(labels)
    found = quality_warnings(
        features,
        labels,
        [(splits or {}).get(i, "train") for i in range(count)],
        np.array([(copies or {}).get(i, i) for i in range(count)]),
        paths=[f"{i}.jpg" for i in range(count)],
        classes=[f"class{label}" for label in range(int(labels.max()) + 1)],
        seed=0,
    )
    assert len({warning["code"] for warning in found}) == len(found)
    return {warning["code"]: warning for warning in found}


def test_pictures_without_copies_and_with_right_labels_give_no_warning() -> None:
    assert warnings_of(*pictures(200, 4)) == {}


def test_copies_in_two_splits_are_told() -> None:
    features, labels = pictures(200, 4)
    features[50] = copy_of(features, 150)

    found = warnings_of(features, labels, splits={50: "val"})

    assert set(found) == {"duplicate_across_splits", *(found.keys() & {"conflicting_labels"})}
    assert found["duplicate_across_splits"]["paths"] == ["50.jpg", "150.jpg"]
    assert found["duplicate_across_splits"]["groups"] == [["50.jpg", "150.jpg"]]
    assert '"exclude": [paths]' in found["duplicate_across_splits"]["detail"]


def test_copies_in_one_split_and_class_are_nobodys_business() -> None:
    features, labels = pictures(200, 4)
    features[50] = copy_of(features, 150)

    assert warnings_of(features, labels) == {}


def test_what_pixels_have_shown_is_not_repeated() -> None:
    features, labels = pictures(200, 4)
    features[50] = copy_of(features, 150)

    assert warnings_of(features, labels, splits={50: "val"}, copies={150: 50}) == {}


def test_copies_in_two_classes_are_told() -> None:
    features, labels = pictures(200, 4)
    features[50] = copy_of(features, 151)

    found = warnings_of(features, labels)

    assert found["conflicting_labels"]["paths"] == ["50.jpg", "151.jpg"]


def test_a_dense_texture_is_not_all_copies() -> None:
    """Everything is near everything: similarity alone would call it copies."""
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(1, 64, generator=generator), -torch.randn(1, 64, generator=generator)])
    features = features.repeat_interleave(60, 0) + 0.3 * torch.randn(120, 64, generator=generator)

    assert near_pairs(features) == []


def test_pairs_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = pictures(100, 4)
    features[[10, 90, 91]] = torch.stack([copy_of(features, 20), copy_of(features, 30), copy_of(features, 30) + 0.01])
    whole = near_pairs(features)

    monkeypatch.setattr(quality, "_ROWS_AT_ONCE", 7)

    assert near_pairs(features) == whole
    assert set(whole) == {(10, 20), (30, 90), (30, 91), (90, 91)}


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_pictures_are_not_judged(count: int) -> None:
    features = torch.ones(count, 4)
    labels = np.arange(count) % 2

    assert near_pairs(features) == []
    assert suspicious_labels(features, labels, 2, groups=np.arange(count), seed=0) == []


def test_planted_wrong_labels_are_found() -> None:
    features, labels = pictures(400, 4)
    wrong = np.random.default_rng(0).choice(400, 10, replace=False)
    true = labels[wrong].copy()
    labels[wrong] = (true + 1) % 4

    found = suspicious_labels(features, labels, 4, groups=np.arange(400), seed=0)

    assert {suspect.index for suspect in found} == set(wrong.tolist())
    assert {suspect.index: suspect.suggested for suspect in found} == dict(zip(wrong.tolist(), true, strict=True))
    assert [suspect.margin for suspect in found] == sorted((suspect.margin for suspect in found), reverse=True)


def test_suspicious_labels_are_told_with_what_they_look_like() -> None:
    features, labels = pictures(200, 4)
    labels[8] = 1

    warning = warnings_of(features, labels)["suspicious_labels"]

    assert (warning["paths"], warning["suggested"]) == (["8.jpg"], {"8.jpg": "class0"})
    assert "8.jpg like class0" in warning["detail"]


def test_suspects_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = pictures(400, 4)
    labels[:40] = (labels[:40] + 1) % 4

    assert len(suspicious_labels(features, labels, 4, groups=np.arange(400), seed=0)) == 20

    monkeypatch.setattr(quality, "MAX_SUSPECTS", 3)
    assert len(suspicious_labels(features, labels, 4, groups=np.arange(400), seed=0)) == 3


def test_a_copy_does_not_vouch_for_a_wrong_label() -> None:
    features, labels = pictures(400, 4)
    features[9], labels[8] = features[8], 1

    alone = suspicious_labels(features, labels, 4, groups=np.arange(400), seed=0)
    together = suspicious_labels(features, labels, 4, groups=np.where(np.arange(400) == 9, 8, np.arange(400)), seed=0)

    assert {suspect.index for suspect in together} == {8, 9}
    assert {suspect.index for suspect in alone} <= {8, 9}


def test_nobody_is_suspected_where_nothing_can_be_told_apart() -> None:
    features, labels = pictures(200, 4, distance=0.0)

    assert suspicious_labels(features, labels, 4, groups=np.arange(200), seed=0) == []


def test_the_only_picture_of_a_class_is_not_suspected() -> None:
    features, labels = pictures(200, 4)
    labels[17] = 4

    assert suspicious_labels(features, labels, 5, groups=np.arange(200), seed=0) == []


def test_a_tick_may_stop_it() -> None:
    features, _ = pictures(100, 4)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        near_pairs(features, tick=stop)


def test_a_tick_may_stop_the_probes_too() -> None:
    features, labels = pictures(200, 4)
    ticks = 0

    def stop_at_the_third() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        suspicious_labels(features, labels, 4, groups=np.arange(200), seed=0, tick=stop_at_the_third)
    assert ticks == 3
