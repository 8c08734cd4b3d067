"""Whether one model is better than another on the same images, or whether chance explains the difference.

Pure arithmetic on what two models said of labelled images; where their answers come from is worker.promotion's part.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

# The share of equally good candidates that may be taken for better ones.
SIGNIFICANCE = 0.05

# Who is preferred where neither is better beyond chance.
Ties = Literal["incumbent", "candidate"]


@dataclass(frozen=True)
class Predictions:
    """What a model says of images whose class is known: three sequences in parallel, classes by name.

    digests: of several tasks an image's is followed by a blank and the task's name, and it is there for each.
    """

    digests: Sequence[str]
    true: Sequence[str]
    predicted: Sequence[str]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """From an evaluation's `predictions`. Raises KeyError, TypeError or ValueError if it is not such a record."""
        digests, true, predicted = (list(record[name]) for name in ("digests", "true", "predicted"))
        if not len(digests) == len(true) == len(predicted):
            raise ValueError("predictions of different lengths")
        return cls(digests, true, predicted)

    @classmethod
    def of_evaluation(cls, evaluation: Mapping[str, Any]) -> Self:
        """Those kept with a model; of several tasks, all of them. Raises as `from_record` does."""
        if "tasks" not in evaluation:
            return cls.from_record(evaluation["predictions"])
        found = cls([], [], [])
        for task, record in evaluation["tasks"].items():
            if "predictions" in record:
                one = cls.from_record(record["predictions"])
                digests = [of_task(digest, task) for digest in one.digests]
                found = cls([*found.digests, *digests], [*found.true, *one.true], [*found.predicted, *one.predicted])
        return found

    def true_classes(self) -> dict[str, str]:
        """Class by digest. A picture that is there twice counts once; one under two classes not at all."""
        found: dict[str, str] = {}
        contradictory = set()
        for digest, name in zip(self.digests, self.true, strict=True):
            if found.setdefault(digest, name) != name:
                contradictory.add(digest)
        return {digest: name for digest, name in found.items() if digest not in contradictory}

    def predicted_classes(self) -> dict[str, str]:
        return dict(zip(self.digests, self.predicted, strict=True))


def of_task(digest: str, task: str) -> str:
    return f"{digest} {task}" if task else digest


def without_task(digest: str) -> str:
    return digest.partition(" ")[0]


@dataclass(frozen=True)
class Paired:
    """Two models on the same images. Of an image with several labels, who gets more of them right counts as right.

    p_value: how often a candidate that is no better does at least as well.
    """

    images: int
    candidate_right_only: int
    incumbent_right_only: int
    p_value: float


def pair(true: Mapping[str, str], candidate: Mapping[str, str], incumbent: Mapping[str, str]) -> Paired:
    """Classes by image, or by image and task: what is true, and what either model says, for all of `true`."""
    # By image: one that is hard is hard in all that is asked of it, so that its labels are no tosses of their own.
    ahead: Counter[str] = Counter()
    for digest, name in true.items():
        ahead[without_task(digest)] += (candidate[digest] == name) - (incumbent[digest] == name)
    candidate_only = sum(labels > 0 for labels in ahead.values())
    incumbent_only = sum(labels < 0 for labels in ahead.values())
    return Paired(len(ahead), candidate_only, incumbent_only, mcnemar_p_value(candidate_only, incumbent_only))


def mcnemar_p_value(candidate_only: int, incumbent_only: int) -> float:
    """Exact, one-sided (McNemar 1947): the chance of at least as many heads in tosses of a fair coin.

    Images on which both are right or both wrong say nothing of which is better, so only the others are counted; each
    falls to either side alike if the models are equally good.
    """
    tosses = candidate_only + incumbent_only
    # In logarithms, since 2^-1100 is no float.
    largest = math.lgamma(tosses + 1) - tosses * math.log(2)
    tail = math.fsum(
        math.exp(largest - math.lgamma(heads + 1) - math.lgamma(tosses - heads + 1))
        for heads in range(candidate_only, tosses + 1)
    )
    return min(1.0, tail)


def is_promotable(paired: Paired, *, ties: Ties = "incumbent") -> bool:
    """Whether the candidate is better beyond chance; with ties to the candidate, whether it is right as often."""
    if ties == "candidate" and paired.candidate_right_only >= paired.incumbent_right_only:
        return True
    return paired.p_value < SIGNIFICANCE
