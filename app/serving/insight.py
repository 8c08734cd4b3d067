"""How far to trust one answer: whether the picture is of the kind that the model knows, which classes it may belong to,
and which training pictures are most like it.

All of it follows from a picture's probabilities and features and the model's reference; no forward pass is made here.
Knows no HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.serving.scores import Scores
from app.vision.outputs import Output
from app.vision.reference import LIMIT_SCORE, Neighbour, Reference, prediction_set


@dataclass(frozen=True)
class Insight:
    """Of one picture.

    ood_score: 0 to 1, higher is stranger. prediction_sets: class names by task, most probable first; empty where no
    coverage was asked for. neighbours: the nearest first; empty where none were asked for.
    """

    ood_score: float
    prediction_sets: Mapping[str, Sequence[str]]
    neighbours: Sequence[Neighbour]

    @property
    def in_distribution(self) -> bool:
        """Nothing stranger than 95 % of held-out pictures."""
        return self.ood_score <= LIMIT_SCORE


def insight(
    scores: Scores,
    reference: Reference,
    outputs: Sequence[Output],
    *,
    coverage: float | None = None,
    neighbours: int = 0,
) -> Insight:
    """coverage: of prediction sets, above 0 and below 1. neighbours: how many."""
    assert scores.features is not None, "a model that has a reference gives features"
    similarities = scores.similarities
    if similarities is None:
        similarities = reference.similarities(scores.features.numpy())
    return Insight(
        ood_score=reference.ood_score(similarities),
        prediction_sets={} if coverage is None else _prediction_sets(scores, reference, outputs, coverage),
        neighbours=reference.nearest(similarities, neighbours) if neighbours else [],  # sorting takes its time
    )


def largest_coverage(images: int) -> float:
    """What so many held-out pictures can promise; beyond it a set cannot but hold all classes."""
    return images / (images + 1)


def _prediction_sets(
    scores: Scores, reference: Reference, outputs: Sequence[Output], coverage: float
) -> dict[str, list[str]]:
    found = {}
    for output, errors in zip(outputs, reference.errors, strict=True):
        values = scores.tasks.get(output.name, scores).values
        found[output.name] = [output.classes[label] for label in prediction_set(values, errors, coverage)]
    return found
