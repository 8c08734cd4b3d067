"""The linear probe: multinomial logistic regression on frozen features, solved to a tolerance and not by epochs.

Knows features and labels; not images, not jobs. The objective is scikit-learn's, with strength = 1 / C:

    sum over images of weight × cross-entropy  +  strength / 2 × |W|²         (the bias is not penalised)

on standardised features. As a sum it is a Gaussian prior on the weights whose meaning does not change with the number
of images, so a strength chosen on a part of the data holds for all of it.

Features are first rotated to their principal axes. With fewer images than features this leaves as many columns as
there are images (the weights lie in the span of the images, and rotations keep |W|), so the cost goes by min(N, D);
and it makes the Hessian nearly diagonal, which lets conjugate gradients end after a few products. The folds of a
cross-validation share one rotated matrix and are solved together, as more columns of the same products.

Bit-same for the same input on the same CPU with the same number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_FOLDS = 5
# Strengths to choose from, strongest first, half a decade apart: 1e5 to 1e-2.
STRENGTHS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(10, -5, -1))
# Where nothing can be held out. Chosen on real sets of 12 to 1,200 images with MobileNetV3's features: 0.3 to 100.
DEFAULT_STRENGTH = 10.0
# The loss along the path has one valley: so many rises in a row end the search before its weak end, which is slow.
_PATIENCE = 2
# A strength is chosen on about so many images, or so many per class if that is more.
_CHOICE_IMAGES, _CHOICE_PER_CLASS = 4000, 20

# A fit ends where the gradient's norm is this share of the one at zero weights.
TOLERANCE, _CHOICE_TOLERANCE = 1e-5, 2e-3
_MAX_NEWTON_STEPS, _MAX_CG_STEPS, _MAX_HALVINGS = 50, 100, 12
# Images × folds × classes in one pass: 8 M are 32 MB, held about six times.
_MAX_PROBABILITIES = 8_000_000
# Directions with a variance below this share of the largest one's are rounding errors of float32 features.
_RANK_TOLERANCE = 1e-10
# Up to so many features in all, a probe is fitted on one thread.
_ONE_THREAD_VALUES = 5_000_000


@contextmanager
def _few_threads(features: Tensor) -> Iterator[None]:
    """One thread for small problems, where threads mostly wait for each other.

    Measured for 1,200 × 1,024 features and 10 classes on two busy cores: 1.5 s of CPU time on one thread, 9 s on two.
    """
    threads = torch.get_num_threads()
    if features.numel() <= _ONE_THREAD_VALUES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Probe:
    """A linear layer on raw features: logits = features @ weight.T + bias.

    weight: float32 (C, D); bias: float32 (C,). cv_loss, cv_accuracy: of held-out images at `strength`; None where the
    strength was given, or there was nothing to hold out.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    cv_loss: float | None
    cv_accuracy: float | None

    def logits(self, features: Tensor) -> Tensor:
        """features: float32 (N, D). Returns float32 (N, C)."""
        return features @ self.weight.T + self.bias


def fit_probe(
    features: Tensor,
    labels: NDArray[np.int64],
    class_count: int,
    *,
    class_weights: tuple[float, ...] | None = None,
    groups: NDArray[np.int64] | None = None,
    seed: int,
    strength: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Probe:
    """features: float32 (N, D), N > 0, finite; labels: int64 (N,), below class_count.

    groups: (N,), images with the same number stay on one side of every fold (views or copies of one picture).
    strength: None chooses one of STRENGTHS by the log loss of a stratified cross-validation that follows from `seed`.
    class_weights: (C,), of each image's term, in the fit and in the choice. A class without images gets zero weights,
    and a bias as if half an image of it had been seen. tick: called often; may raise to stop.
    """
    with _few_threads(features), torch.no_grad():
        basis = _Basis.of(features)
        weights = _image_weights(labels, class_weights)
        cv_loss = cv_accuracy = None
        if strength is None:
            part = _choice_part(labels, groups, seed)
            is_all = len(part) == len(labels)
            strength, cv_loss, cv_accuracy = _choose_strength(
                basis if is_all else _Basis.of(features[torch.from_numpy(part)]),
                labels[part],
                weights[torch.from_numpy(part)],
                class_count,
                assign_folds(labels[part], None if groups is None else groups[part], seed=seed),
                tick,
            )
        objective = _Objective.of(basis, labels, weights[:, None], class_count, tick)
        solution = objective.minimise(objective.start(), strength, tolerance=TOLERANCE)
        weight, bias = basis.unfold(solution[:, 0])
        absent = torch.from_numpy(np.bincount(labels, minlength=class_count) == 0)
        if absent.any():
            # Against the other classes' mean evidence, so that it holds wherever the logits' common zero lies.
            logits = features @ weight[~absent].T + bias[~absent]
            weight[absent] = 0
            bias[absent] = logits.logsumexp(1).mean() - np.log(2 * len(labels))
        return Probe(weight, bias, strength, cv_loss, cv_accuracy)


def out_of_fold(
    features: Tensor,
    labels: NDArray[np.int64],
    class_count: int,
    *,
    groups: NDArray[np.int64] | None = None,
    seed: int,
    strength: float,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Probabilities, float32 (N, C), each image's from a probe fitted without it and its group.

    Only the features' scale is taken from all images; it says nothing about labels. A class that is held out whole
    has probability 0 there. Where nothing can be held out, all classes that occur are equally likely.
    tick: called often; may raise to stop.
    """
    folds = assign_folds(labels, groups, seed=seed)
    with _few_threads(features), torch.no_grad():
        result = torch.zeros(len(labels), class_count)
        if folds.max() == 0:
            result[:, torch.from_numpy(np.unique(labels))] = 1 / len(np.unique(labels))
            return result
        basis, ones = _Basis.of(features), torch.ones(len(labels))
        for held_out in _fold_chunks(folds, class_count):
            objective = _Objective.of(basis, labels, _kept(held_out) * ones[:, None], class_count, tick)
            solution = objective.minimise(objective.start(), strength, tolerance=_CHOICE_TOLERANCE)
            for k in range(held_out.shape[1]):
                rows = held_out[:, k]
                logits = basis.points[rows] @ solution[:, k] + objective.mask[k]
                result[rows] = logits.softmax(1)
        return result


def learning_curve(
    features: Tensor,
    labels: NDArray[np.int64],
    val_features: Tensor,
    val_labels: NDArray[np.int64],
    class_count: int,
    *,
    class_weights: tuple[float, ...] | None = None,
    seed: int,
    strength: float,
    shares: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    tick: Callable[[], None] = lambda: None,
) -> list[tuple[int, float]]:
    """(training images, validation accuracy) for growing shares of the training images, at least one of each class.

    Small shares are drawn several times, stratified and from `seed` alone: what a small sample shows depends most on
    which it is. A share that comes to the same number of images as the one before is left out. class_weights: as
    fit_probe has them. tick: called often; may raise to stop.
    """
    truth = torch.from_numpy(val_labels)
    points: list[tuple[int, float]] = []
    for share in shares:
        seen = {images for images, _ in points}
        for draw in range(1 if share >= 1 else 2 if share >= 0.5 else 3):
            part = _stratified_part(labels, share, seed=seed, draw=draw)
            if len(part) in seen:
                break
            some = features[torch.from_numpy(part)]
            probe = fit_probe(
                some, labels[part], class_count, class_weights=class_weights, seed=seed, strength=strength, tick=tick
            )
            accuracy = (probe.logits(val_features).argmax(1) == truth).double().mean().item()
            points.append((len(part), accuracy))
    return points


def assign_folds(labels: NDArray[np.int64], groups: NDArray[np.int64] | None, *, seed: int) -> NDArray[np.int64]:
    """A fold for each image, int64 (N,), 0 to at most MAX_FOLDS - 1: as many as the largest class has groups.

    Each class's groups are dealt out in turn, going on where the class before ended, so that both classes and folds
    are balanced; a class with fewer groups than folds is held out in some folds only. A group of several classes
    counts as its first image's.
    """
    members = np.arange(len(labels)) if groups is None else groups
    _, first, group_of = np.unique(members, return_index=True, return_inverse=True)
    group_labels = labels[first]
    fold_count = min(MAX_FOLDS, int(np.bincount(group_labels).max()))
    shuffled = np.random.default_rng(seed).permutation(len(first))
    by_class = shuffled[np.argsort(group_labels[shuffled], kind="stable")]
    folds = np.empty(len(first), dtype=np.int64)
    folds[by_class] = np.arange(len(first)) % fold_count
    return folds[group_of.reshape(-1)]


# The choice of a strength


def _choose_strength(
    basis: "_Basis",
    labels: NDArray[np.int64],
    weights: Tensor,
    class_count: int,
    folds: NDArray[np.int64],
    tick: Callable[[], None],
) -> tuple[float, float | None, float | None]:
    """The strength of the lowest held-out loss, that loss and the accuracy there, from strong to weak, warm-started."""
    if folds.max() == 0 or len(np.unique(labels)) == 1:
        return DEFAULT_STRENGTH, None, None
    chunks = []
    for held_out in _fold_chunks(folds, class_count):
        objective = _Objective.of(basis, labels, _kept(held_out) * weights[:, None], class_count, tick)
        chunks.append((held_out, objective, objective.start()))
    best: tuple[float, float, float] | None = None
    rises = 0
    for strength in STRENGTHS:
        loss = weight = 0.0
        right = 0
        for i, (held_out, objective, start) in enumerate(chunks):
            solution = objective.minimise(start, strength, tolerance=_CHOICE_TOLERANCE)
            chunks[i] = (held_out, objective, solution)
            losses, is_right = objective.scores(solution)
            # A class that a fold has not seen has no finite loss there, whatever the strength.
            counted = held_out * weights[:, None] * losses.isfinite()
            loss += (counted * losses.nan_to_num(posinf=0)).sum(dtype=torch.float64).item()
            weight += counted.sum(dtype=torch.float64).item()
            right += int((is_right & held_out).sum())
        mean = loss / weight if weight else 0.0
        if best is None or mean < best[1]:
            best, rises = (strength, mean, right / len(labels)), 0
        else:
            rises += 1
            if rises > _PATIENCE:
                break
    assert best is not None
    return best


def _choice_part(labels: NDArray[np.int64], groups: NDArray[np.int64] | None, seed: int) -> NDArray[np.int64]:
    """The images a strength is chosen on, ascending: all, or of each class the same share, by whole groups."""
    limit = max(_CHOICE_IMAGES, _CHOICE_PER_CLASS * len(np.unique(labels)))
    if len(labels) <= limit:
        return np.arange(len(labels))
    members = np.arange(len(labels)) if groups is None else groups
    _, first, group_of = np.unique(members, return_index=True, return_inverse=True)
    kept = _stratified_part(labels[first], limit / len(labels), seed=seed, draw=0)
    return np.flatnonzero(np.isin(group_of.reshape(-1), kept))


def _stratified_part(labels: NDArray[np.int64], share: float, *, seed: int, draw: int) -> NDArray[np.int64]:
    """Ascending places of this share of every class, at least one; a smaller share is part of a larger one."""
    parts = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        shuffled = np.random.default_rng([seed, draw, int(label)]).permutation(places)
        parts.append(shuffled[: max(1, round(share * len(places)))])
    return np.sort(np.concatenate(parts))


def _fold_chunks(folds: NDArray[np.int64], class_count: int) -> Iterator[Tensor]:
    """Which images are held out, bool (N, K), for as many folds at a time as memory allows."""
    count = int(folds.max()) + 1
    step = max(1, _MAX_PROBABILITIES // (len(folds) * class_count))
    for start in range(0, count, step):
        yield torch.from_numpy(folds[:, None] == np.arange(start, min(start + step, count)))


def _kept(held_out: Tensor) -> Tensor:
    return (~held_out).float()


def _image_weights(labels: NDArray[np.int64], class_weights: Sequence[float] | None) -> Tensor:
    if class_weights is None:
        return torch.ones(len(labels))
    return torch.tensor(class_weights, dtype=torch.float32)[torch.from_numpy(labels)]


# The solver


@dataclass(frozen=True)
class _Basis:
    """Standardised features on their principal axes.

    points: float32 (N, R + 1), the last column ones, for the bias. variances: (R + 1,), mean squares of the columns.
    axes: (D, R), orthonormal; mean, inverse_deviation: (D,), the latter 0 for a constant feature.
    """

    points: Tensor
    variances: Tensor
    axes: Tensor
    mean: Tensor
    inverse_deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "_Basis":
        count, width = features.shape
        mean = features.mean(0, dtype=torch.float64).float()
        standard = features - mean
        deviation = standard.square().mean(0, dtype=torch.float64).sqrt().float()
        # Rounding leaves a constant feature a deviation of about 1e-7 of its value, and never exactly 0.
        is_constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-30)
        inverse = torch.where(is_constant, 0.0, 1 / deviation)
        standard *= inverse
        if count < width:
            # Twice the precision: the Gram matrix squares the singular values' ratios.
            doubled = standard.double()
            variances, vectors = torch.linalg.eigh(doubled @ doubled.T)
            kept = variances > _RANK_TOLERANCE * variances[-1].clamp(min=1e-300)
            lengths = variances[kept].sqrt()
            axes = (doubled.T @ (vectors[:, kept] / lengths)).float()
            rotated, variances = (vectors[:, kept] * lengths).float(), variances[kept]
        else:
            # Here any orthonormal axes give the same minimum, and half the precision is ready in half the time.
            variances, axes = torch.linalg.eigh(standard.T @ standard)
            rotated, variances = standard @ axes, variances.clamp(min=0)
        points = torch.cat([rotated, torch.ones(count, 1)], dim=1)
        return cls(points, torch.cat([variances.float() / count, torch.ones(1)]), axes, mean, inverse)

    def unfold(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """solution: (R + 1, C) on `points`. Returns weight (C, D) and bias (C,) on raw features."""
        weight = (self.axes.double() @ solution[:-1].double()).T * self.inverse_deviation.double()
        bias = solution[-1].double() - weight @ self.mean.double()
        return weight.float().contiguous(), bias.float()


@dataclass(frozen=True)
class _Objective:
    """K penalised regressions on the same points, which differ in the images' weights. Solutions: (R + 1, K, C).

    weights: (N, K), 0 for an image that is held out. mask: (K, C), added to logits; -inf for a class without images.
    truth: int64 (N, 1, 1). tick: called at each product with the points; may raise to stop.
    """

    basis: _Basis
    weights: Tensor
    truth: Tensor
    mask: Tensor
    tick: Callable[[], None]

    @classmethod
    def of(
        cls,
        basis: _Basis,
        labels: NDArray[np.int64],
        weights: Tensor,
        class_count: int,
        tick: Callable[[], None],
    ) -> "_Objective":
        truth = torch.from_numpy(labels)
        per_class = torch.zeros(class_count, weights.shape[1]).index_add_(0, truth, weights)
        mask = torch.zeros(weights.shape[1], class_count).masked_fill(per_class.T == 0, -torch.inf)
        return cls(basis, weights, truth[:, None, None], mask, tick)

    def start(self) -> Tensor:
        return torch.zeros(self.basis.points.shape[1], *self.mask.shape)

    def scores(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (inf for a class that the fit has not seen) and whether the prediction is right, both (N, K)."""
        logits = self._logits(solution) + self.mask
        losses = logits.logsumexp(2) - self._of_truth(logits)
        return losses, logits.argmax(2) == self.truth[:, :, 0]

    def minimise(self, start: Tensor, strength: float, *, tolerance: float) -> Tensor:
        """Newton's method with conjugate gradients (Nocedal and Wright 2006, algorithm 7.1), all K problems at once.

        A problem that has converged is left alone while others go on.
        """
        penalty = torch.full((len(start), 1, 1), strength)
        penalty[-1] = 0
        solution, logits = start, self._logits(start)
        losses = self._losses(logits, solution, penalty)
        target = tolerance * _norm(self._gradient(self._probabilities(torch.zeros_like(logits))))
        for _ in range(_MAX_NEWTON_STEPS):
            probabilities = self._probabilities(logits)
            gradient = self._gradient(probabilities) + penalty * solution
            norm = _norm(gradient)
            active = norm > target
            if not active.any():
                break
            step = self._newton_step(probabilities, gradient, penalty, active, torch.maximum(0.1 * norm, 0.5 * target))
            step_logits = self._logits(step)
            slope = (gradient * step).sum((0, 2))
            length = active.float()
            for _ in range(_MAX_HALVINGS):
                tried = logits + length[:, None] * step_logits
                moved = solution + length[:, None] * step
                new_losses = self._losses(tried, moved, penalty)
                # Near the minimum a float32 loss cannot show its fall, so it need only not rise by more than rounding.
                fell = new_losses <= losses + 1e-4 * length * slope + 1e-6 * losses.abs()
                if fell.all():
                    break
                length = torch.where(fell, length, length / 2)
            logits, solution, losses = tried, moved, new_losses
        return solution

    def _newton_step(
        self, probabilities: Tensor, gradient: Tensor, penalty: Tensor, active: Tensor, target: Tensor
    ) -> Tensor:
        """An approximate solution of Hessian × step = -gradient, to a residual of `target`; 0 where not active."""
        weighted = self.weights[:, :, None] * probabilities
        curvature = (weighted * (1 - probabilities)).sum(0)  # (K, C)
        # The Hessian's diagonal as if a feature's square and an image's p (1 - p) were independent.
        diagonal = self.basis.variances[:, None, None] * curvature + penalty
        diagonal.clamp_(min=1e-6 * float(diagonal.max()))

        def product(direction: Tensor) -> Tensor:
            change = self._logits(direction)
            centre = (probabilities * change).sum(2, keepdim=True)
            return self._against_points(weighted * (change - centre)) + penalty * direction

        return _conjugate_gradients(product, gradient, diagonal, active, target)

    def _logits(self, solution: Tensor) -> Tensor:
        self.tick()
        return (self.basis.points @ solution.flatten(1)).view(-1, *self.mask.shape)

    def _against_points(self, residuals: Tensor) -> Tensor:
        return (self.basis.points.T @ residuals.flatten(1)).view(-1, *self.mask.shape)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return (logits + self.mask).softmax(2)

    def _gradient(self, probabilities: Tensor) -> Tensor:
        """Without the penalty's."""
        residuals = probabilities.scatter_add(2, self._truth_index(), -torch.ones_like(probabilities[:, :, :1]))
        return self._against_points(self.weights[:, :, None] * residuals)

    def _losses(self, logits: Tensor, solution: Tensor, penalty: Tensor) -> Tensor:
        """(K,)"""
        # Without the mask for the truth, or an image that is held out with its class would make 0 × inf.
        each = (logits + self.mask).logsumexp(2) - self._of_truth(logits)
        fit = (self.weights * each).sum(0, dtype=torch.float64).float()
        return fit + (penalty * solution.square()).sum((0, 2), dtype=torch.float64).float() / 2

    def _of_truth(self, logits: Tensor) -> Tensor:
        return logits.gather(2, self._truth_index())[:, :, 0]

    def _truth_index(self) -> Tensor:
        return self.truth.expand(-1, self.mask.shape[0], 1)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], gradient: Tensor, diagonal: Tensor, active: Tensor, target: Tensor
) -> Tensor:
    """Preconditioned by `diagonal`; each problem stops by itself once its residual's norm is below `target` (K,)."""
    step = torch.zeros_like(gradient)
    residual = -gradient
    direction = residual / diagonal
    fall = (residual * direction).sum((0, 2))
    for _ in range(_MAX_CG_STEPS):
        active = active & (_norm(residual) > target)
        if not active.any():
            break
        bent = product(direction)
        length = torch.where(active, fall / (direction * bent).sum((0, 2)), 0.0)[:, None]
        step = step + length * direction
        residual = residual - length * bent
        scaled = residual / diagonal
        new_fall = (residual * scaled).sum((0, 2))
        direction = scaled + torch.where(active, new_fall / fall, 0.0)[:, None] * direction
        fall = new_fall
    return step


def _norm(gradient: Tensor) -> Tensor:
    """(K,), of (R + 1, K, C)."""
    return gradient.square().sum((0, 2)).sqrt()
