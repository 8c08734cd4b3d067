"""What a model says of one picture. Knows numbers and names; not networks, not HTTP."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Self

from torch import Tensor

from app.serving.adaptation import Plan
from app.vision.outputs import Output
from app.vision.reference import Features


@dataclass(frozen=True)
class Scores:
    """One picture's class probabilities. values: float per class, in the model's order; they sum to 1.

    tasks: scores by task where the model tells several things, the first one's (which are these) included.
    features: float32 (D,), what the head saw. similarities: float32 (N,), to each training picture of the model's
    reference, where they are known already.
    """

    classes: Sequence[str]
    values: Sequence[float]
    tasks: Mapping[str, "Scores"] = field(default_factory=dict)
    features: Tensor | None = field(default=None, repr=False, compare=False)
    similarities: Features | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        row: Sequence[float],
        outputs: Sequence[Output],
        *,
        features: Tensor,
        similarities: Features | None = None,
    ) -> Self:
        """row: probabilities of all outputs, one after the other."""
        values = iter(row)
        found = [cls(output.classes, list(islice(values, len(output.classes)))) for output in outputs]
        tasks = {output.name: scores for output, scores in zip(outputs, found, strict=True)} if found[1:] else {}
        return replace(found[0], tasks=tasks, features=features, similarities=similarities)

    @property
    def best(self) -> int:
        """The most probable class's place; of equals the first one's."""
        return max(range(len(self.values)), key=lambda i: self.values[i])

    @property
    def labels(self) -> dict[str, str]:
        """The best class's name by task; by "" where the model tells one thing."""
        return {task: scores.classes[scores.best] for task, scores in (self.tasks or {"": self}).items()}

    def told(self, top_k: int) -> dict[str, Any]:
        """As an answer says it: the best class, and the best ones."""
        top = [{"label": label, "score": score} for label, score in self.top(top_k)]
        return {**top[0], "top": top}

    def top(self, k: int) -> list[tuple[str, float]]:
        """The min(k, classes) most probable classes, best first; equals in the model's order."""
        best = heapq.nlargest(k, range(len(self.values)), key=self.values.__getitem__)
        return [(self.classes[i], self.values[i]) for i in best]


@dataclass(frozen=True)
class Adapted:
    """What a copy of a model says that was tuned to the picture. scores: the copy's, as far as they count: `share`.

    plan: by which it was tuned. seconds: that it took, waiting for the device included.
    """

    plan: Plan
    scores: Scores
    share: float
    seconds: float
