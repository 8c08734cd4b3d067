"""Method auto's rules: who may go on, who wins, and how that is told. Pure numbers; no networks, no jobs.

Successive halving (Jamieson and Talwalkar 2016) with what is particular here: the methods are ordered from the simplest
to the most expensive, each gets a short heat against the best so far before it is trained to the end, and all are
compared on the same validation images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.training.compare import SIGNIFICANCE, mcnemar_p_value

# Share of a method's epochs that it may train before it must have shown that it can win.
HEAT_SHARE = 0.25
MIN_HEAT_EPOCHS = 2
# Less than this is not worth another method's time, and within it the simpler method wins.
TIE_POINTS = 0.005


@dataclass(frozen=True)
class Contender:
    """One method's result. correct: per validation image. val_accuracies: of its epochs; seconds: all it took."""

    method: str
    correct: NDArray[np.bool_]
    accuracy_ci95: tuple[float, float]
    val_loss: float
    macro_f1: float
    val_accuracies: tuple[float, ...]
    seconds: float
    latency_seconds: float  # of one image, forward pass alone
    size_bytes: int

    @property
    def val_accuracy(self) -> float:
        return float(self.correct.mean())


@dataclass(frozen=True)
class Dropped:
    """A method that was not trained to the end, and why."""

    method: str
    reason: str
    val_accuracy: float | None = None
    seconds: float = 0.0


def heat_epochs(epochs: int) -> int:
    """How many of its epochs a method may train before it is compared."""
    return min(epochs, max(MIN_HEAT_EPOCHS, math.ceil(HEAT_SHARE * epochs)))


def no_room(leader: Contender) -> str | None:
    """Why no other method need be tried: even one that halved the leader's mistakes would tie with it, or could not be
    told from it on these images beyond chance. None where one could."""
    mistakes, images = int((~leader.correct).sum()), len(leader.correct)
    made = f"{leader.method} makes {mistakes} mistake{'' if mistakes == 1 else 's'} on {images} validation images"
    if mistakes // 2 <= TIE_POINTS * images:
        return f"{made}, which leaves next to nothing to gain"
    if mcnemar_p_value(mistakes // 2, 0) >= SIGNIFICANCE:
        return f"{made}: even with half of them put right, chance could explain the difference"
    return None


def survives(val_accuracies: Sequence[float], leader: Contender) -> bool:
    """Whether a method that has trained these epochs may go on.

    It may unless it is behind where the leader was after as many epochs by more than a standard error of the accuracy;
    a leader whose head was solved for has no such past, and all of its accuracy at once. Without that allowance chance
    decides: on tiny_longtail full fine-tuning, three points better in the end, was once dropped for being one behind.
    """
    past = leader.val_accuracies[: len(val_accuracies)]
    # As the loop measures the challenger: of several tasks an image counts once, however many labels it has.
    reached = max(past, default=leader.val_accuracy)
    allowance = math.sqrt(reached * (1 - reached) / len(leader.correct))
    return max(val_accuracies) > reached - allowance


def is_behind(val_accuracies: Sequence[float], leader: Contender, *, epochs: int) -> bool:
    """Whether a method has lost its heat. epochs: how many it takes in all, as far as that is known.

    One that has survived goes on, though a budget that proves shorter would have ended its heat earlier.
    """
    heat, trained = heat_epochs(epochs), len(val_accuracies)
    return trained >= heat and not any(survives(val_accuracies[:n], leader) for n in range(heat, trained + 1))


def winner(contenders: Sequence[Contender]) -> Contender:
    """The most accurate on the validation images; among those within a tie of it, the first, which is the simplest."""
    most = max(int(contender.correct.sum()) for contender in contenders)
    return next(c for c in contenders if most - int(c.correct.sum()) <= TIE_POINTS * len(c.correct))


def reason(contenders: Sequence[Contender], dropped: Sequence[Dropped]) -> str:
    """One sentence: who won, and against whom."""
    won = winner(contenders)
    parts = [_comparison(won, other) for other in contenders if other is not won]
    for why in dict.fromkeys(other.reason for other in dropped):  # methods with the same one are told of together
        names = [other.method for other in dropped if other.reason == why]
        parts.append(f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} left: {why}")
    low, high = won.accuracy_ci95
    found = f"{won.method} wins with {won.val_accuracy:.3f} ({low:.3f} to {high:.3f})"
    return f"{'; '.join([f'{found} on {len(won.correct)} validation images', *parts])}."


def _comparison(won: Contender, other: Contender) -> str:
    gap = won.val_accuracy - other.val_accuracy
    if abs(gap) <= TIE_POINTS:
        return f"{other.method} ties with it"
    return f"it is {100 * gap:.1f} points ahead of {other.method}"


def table(contenders: Sequence[Contender], dropped: Sequence[Dropped]) -> list[dict[str, Any]]:
    """A row per method, in the order that they were tried, as the job's metrics show it."""
    rows: list[dict[str, Any]] = [
        {
            "method": c.method,
            "val_accuracy": c.val_accuracy,
            "val_accuracy_ci95": list(c.accuracy_ci95),
            "val_loss": c.val_loss,
            "macro_f1": c.macro_f1,
            "latency_seconds": c.latency_seconds,
            "size_bytes": c.size_bytes,
            "seconds": c.seconds,
            "is_winner": c is winner(contenders),
            "dropped": None,
        }
        for c in contenders
    ]
    rows += [
        {
            "method": d.method,
            "val_accuracy": d.val_accuracy,
            "val_accuracy_ci95": None,
            "val_loss": None,
            "macro_f1": None,
            "latency_seconds": None,
            "size_bytes": None,
            "seconds": d.seconds,
            "is_winner": False,
            "dropped": d.reason,
        }
        for d in dropped
    ]
    return rows
