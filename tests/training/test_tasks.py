"""Several tasks at once: each as if it were alone, and a label that lacks asks for nothing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.training.tasks import Tasks

TASKS = Tasks((3, 2), ("colour", "light"))
LABELS = torch.tensor([[0, 1], [2, -1], [-1, 0], [1, 1]])
LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def alone(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    """Cross-entropy of the labelled images of one task, 0 for the others."""
    losses = torch.zeros(len(labels))
    known = labels >= 0
    losses[known] = functional.cross_entropy(logits[known], labels[known], reduction="none", **options)  # type: ignore[arg-type]
    return losses


def test_loss_is_the_sum_of_what_each_task_would_have_alone() -> None:
    expected = alone(LOGITS[:, :3], LABELS[:, 0], label_smoothing=0.1) + alone(
        LOGITS[:, 3:], LABELS[:, 1], label_smoothing=0.1
    )
    assert torch.equal(TASKS.losses(LOGITS, LABELS, label_smoothing=0.1), expected)


def test_probabilities_of_labels_give_the_loss_of_the_labels() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.5])
    probabilities = TASKS.one_hot(LABELS).float()
    assert probabilities.sum(1).tolist() == [2, 1, 1, 2]
    for options in ({}, {"weights": weights}, {"label_smoothing": 0.1}):
        torch.testing.assert_close(
            TASKS.losses(LOGITS, probabilities, **options),  # type: ignore[arg-type]
            TASKS.losses(LOGITS, LABELS, **options),  # type: ignore[arg-type]
        )


def test_mixture_with_an_image_without_the_label_counts_as_its_share() -> None:
    mixed = (
        0.7 * TASKS.one_hot(LABELS[:1]).float() + 0.3 * TASKS.one_hot(LABELS[2:3]).float()
    )  # no colour in the second
    colour = 0.7 * functional.cross_entropy(LOGITS[:1, :3], LABELS[:1, 0])
    light = 0.7 * functional.cross_entropy(LOGITS[:1, 3:], LABELS[:1, 1])
    light += 0.3 * functional.cross_entropy(LOGITS[:1, 3:], LABELS[2:3, 1])
    torch.testing.assert_close(TASKS.losses(LOGITS[:1], mixed)[0], colour + light)


def test_missing_label_gives_no_gradient_to_its_task() -> None:
    logits = LOGITS.clone().requires_grad_()
    TASKS.losses(logits, LABELS).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[1, 3:].tolist() == [0, 0]
    assert logits.grad[2, :3].tolist() == [0, 0, 0]
    assert (logits.grad[0] != 0).all()


def test_right_and_accuracies_count_only_labels_that_are_there() -> None:
    logits = torch.tensor(
        [[9.0, 0, 0, 0, 9], [9, 0, 0, 9, 0], [0, 9, 0, 9, 0], [0, 9, 0, 9, 0]]  # right: both; none; light; colour
    )
    assert TASKS.right(logits, LABELS).tolist() == [1.0, 0.0, 1.0, 0.5]
    assert TASKS.accuracies(logits, LABELS) == {"colour": pytest.approx(2 / 3), "light": pytest.approx(2 / 3)}
    nothing = torch.tensor([[0, -1]])
    assert TASKS.accuracies(logits[:1], nothing) == {"colour": 1.0}


def test_one_task_is_plain_cross_entropy_to_the_bit() -> None:
    one, labels = Tasks((5,)), torch.tensor([0, 3, 4, 1])
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.5])
    expected = functional.cross_entropy(LOGITS, labels, weights, reduction="none", label_smoothing=0.1)
    assert torch.equal(one.losses(LOGITS, labels, weights=weights, label_smoothing=0.1), expected)
    assert one.accuracies(LOGITS, labels) == {}
