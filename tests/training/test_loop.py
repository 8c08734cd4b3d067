"""The training loop against a hand-written one, against itself after a kill, and out of memory."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders
from torch import Tensor, nn
from torch.nn import functional

from app.errors import JobFailed
from app.storage import LocalStorage
from worker.training import loop
from worker.training.checkpoint import Checkpoints
from worker.training.loop import Hooks, Plan, StepProgress, fit, is_gain, predict_logits, trains_batch_norm
from worker.training.optim import Schedule
from worker.training.pixels import Source, batch_positions
from worker.training.state import AVERAGED_STEPS, EpochResult, LoopState, Measured, move_average


def test_losses_equal_the_textbook_loop_written_by_hand() -> None:
    plan = builders.plan(augmentation="none", epochs=3, schedule=Schedule("step", 3, 5, step_size=2, gamma=0.1))
    ours = list(fit(builders.state(builders.network(), rate=0.05), plan))

    network = builders.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(3):
        network.train()
        running_loss, running_correct = 0.0, 0
        for positions in batch_positions(22, 5, seed=0, epoch=epoch):
            inputs = _tensors(plan.train, positions)
            labels = torch.from_numpy(plan.train.labels[positions])
            optimizer.zero_grad()
            outputs = network(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * len(labels)
            running_correct += int((outputs.argmax(1) == labels).sum())
        scheduler.step()
        network.eval()
        with torch.no_grad():
            outputs = network(_tensors(plan.val, np.arange(12)))
        assert ours[epoch].train_loss == pytest.approx(running_loss / 22, abs=1e-5)
        assert ours[epoch].train_accuracy == pytest.approx(running_correct / 22)
        assert ours[epoch].val_loss == pytest.approx(
            criterion(outputs, torch.from_numpy(plan.val.labels)).item(), abs=1e-5
        )


def test_an_epochs_loss_is_the_mean_over_images_though_its_last_batch_is_smaller() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    plan = builders.plan(augmentation="none", epochs=1)
    images = _tensors(plan.train, np.arange(22))
    expected = functional.cross_entropy(network(images), torch.from_numpy(plan.train.labels)).item()
    # With a rate this small the weights stay where they are, and the mean over the epoch is one forward pass.
    (result,) = fit(builders.state(network, rate=1e-12), plan)
    assert result.train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_a_run_killed_at_a_step_ends_with_the_weights_of_one_that_was_not(
    optimizer: str, killed_after: int, storage: LocalStorage
) -> None:
    plan = builders.plan(epochs=3, mixup=0.2, cutmix=1.0, label_smoothing=0.1)

    def begin() -> LoopState:
        return builders.state(builders.network(dropout=0.3), optimizer=optimizer, rate=0.01, ema=0.9)

    undisturbed = begin()
    expected = list(fit(undisturbed, plan))

    killed = begin()
    checkpoints = Checkpoints(storage, job_id="job_1", fence=1)
    _run_until_step(killed, plan, killed_after)
    checkpoints.save(killed.tensors(), killed.numbers())

    resumed = begin()
    found = Checkpoints(storage, job_id="job_1", fence=2).newest()
    assert found is not None
    resumed.restore(found.tensors, found.numbers)
    assert resumed.total_steps == killed_after
    rest = list(fit(resumed, plan))

    assert builders.same(builders.weights(resumed.network), builders.weights(undisturbed.network))
    assert resumed.ema is not None
    assert undisturbed.ema is not None
    assert builders.same(resumed.ema, undisturbed.ema)
    assert resumed.best is not None
    assert undisturbed.best is not None
    assert builders.same(resumed.best.weights, undisturbed.best.weights)
    assert [r.train_loss for r in rest] == [r.train_loss for r in expected][-len(rest) :]


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    def train(seed: int) -> dict[str, Tensor]:
        state = builders.state(builders.network())
        list(fit(state, builders.plan(seed=seed)))
        return builders.weights(state.network)

    assert builders.same(train(0), train(0))
    assert not builders.same(train(0), train(1))


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ({"mixup": 0.2}, {"mixup"}),
        ({"cutmix": 1.0}, {"cutmix"}),
        ({"mixup": 0.2, "cutmix": 1.0}, {"mixup", "cutmix"}),
        ({}, set()),
    ],
)
def test_each_batch_takes_one_of_the_mixtures_that_are_on(
    values: dict[str, float], taken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, float]] = []

    def noted(name: str, mix: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def noting(images: Tensor, targets: Tensor, *, alpha: float, random: np.random.Generator) -> Any:
            calls.append((name, alpha))
            return mix(images, targets, alpha=alpha, random=random)

        return noting

    monkeypatch.setattr(loop, "mixup", noted("mixup", loop.mixup))
    monkeypatch.setattr(loop, "cutmix", noted("cutmix", loop.cutmix))
    list(fit(builders.state(builders.network()), builders.plan(epochs=3, **values)))
    assert len(calls) == (15 if values else 0)
    assert {name for name, _ in calls} == taken
    assert all(alpha == values[name] for name, alpha in calls)


def test_gradients_computed_in_parts_move_the_weights_as_the_whole_batch_does() -> None:
    # Without batch-norm, whose statistics are of each part.
    def train(parts: int) -> LoopState:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        state = builders.state(network)
        state.micro_batches = parts
        list(fit(state, builders.plan(batch_size=11, class_weights=(1.0, 2.0, 0.5))))
        return state

    whole, parts = train(1), train(4)
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(parts.network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


class FullUntilHalved(nn.Module):
    """A network that runs out of memory on more than `limit` images at once while training."""

    def __init__(self, limit: int, error: Exception) -> None:
        super().__init__()
        self.inner = builders.network()
        self._limit = limit
        self._error = error

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self._limit:
            raise self._error
        return self.inner(images)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_halves_the_batch_says_so_and_trains_on(error: Exception) -> None:
    told: list[str] = []
    state = builders.state(FullUntilHalved(4, error))
    plan = builders.plan(batch_size=16, epochs=1)
    (result,) = fit(state, plan, Hooks(log=lambda message, _details: told.append(message)))
    assert state.micro_batches == 4
    assert [message.split(";")[0] for message in told] == [
        "Out of memory: batches of 16 are now computed in 2 parts",
        "Out of memory: batches of 16 are now computed in 4 parts",
    ]
    assert result.step == 2


def test_out_of_memory_at_the_smallest_parts_fails_with_advice() -> None:
    state = builders.state(FullUntilHalved(0, MemoryError()))
    with pytest.raises(JobFailed, match="smaller batch_size") as failure:
        list(fit(state, builders.plan(batch_size=16)))
    assert failure.value.code == "out_of_memory"


def test_another_runtime_error_passes_as_it_is() -> None:
    state = builders.state(FullUntilHalved(0, RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(fit(state, builders.plan()))


def test_a_loss_that_is_no_number_at_any_rate_fails_as_diverged() -> None:
    told: list[str] = []
    state = builders.state(_deep(), rate=1e30)
    with pytest.raises(JobFailed, match="learning_rate") as failure:
        list(fit(state, builders.plan(epochs=4), Hooks(log=lambda message, _details: told.append(message))))
    assert failure.value.code == "diverged"
    assert [message.split(". ")[1] for message in told] == [
        "It goes on from the start, with a tenth of the learning rates.",
        "It goes on from the start, with a hundredth of the learning rates.",
    ]


def test_a_measure_that_is_no_number_fails_as_diverged() -> None:
    plan = builders.plan(measure=lambda _on_batch: Measured(math.nan, None))
    with pytest.raises(JobFailed) as failure:
        list(fit(builders.state(builders.network()), plan))
    assert failure.value.code == "diverged"


def _deep() -> nn.Sequential:
    """Without normalisation: it diverges at rates from 0.3 on, though not in its first epoch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.Linear(16, 16), nn.Linear(16, 3))


class NoNumberAt(nn.Module):
    """A network that gives no numbers in some of the passes of its training, counted from 0."""

    def __init__(self, *passes: int) -> None:
        super().__init__()
        self.inner = builders.network()
        self._passes, self._passed = passes, itertools.count()

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.inner(images)
        return output * math.nan if self.training and next(self._passed) in self._passes else output


def test_a_setback_begins_the_epoch_again_with_the_best_weights_and_a_tenth_of_the_rate() -> None:
    state = builders.state(NoNumberAt(5 + 5 + 3), rate=0.05, ema=0.9)
    after: list[dict[str, Tensor]] = []

    def save(state: LoopState) -> None:
        if state.setbacks == 1 and not after:
            assert (state.epoch, state.step, state.total_steps) == (2, 0, 10)
            assert state.best is not None
            assert builders.same(state.live, state.best.weights)
            assert state.ema is not None
            assert builders.same(state.live, state.ema)
            assert not state.optimizer.state
            after.append(dict(state.live))

    results = list(fit(state, builders.plan(epochs=4), Hooks(save=save)))
    assert after
    assert [result.epoch for result in results] == [1, 2, 3, 4]
    assert [result.learning_rate for result in results] == [0.05, 0.05, 0.005, 0.005]
    assert results[-1].step == 20


def test_a_second_setback_begins_with_the_weights_of_the_start() -> None:
    state = builders.state(NoNumberAt(5 + 3, 5 + 4 + 1), rate=0.05)
    start = builders.weights(state.network)
    seen: list[bool] = []
    hooks = Hooks(save=lambda state: seen.append(builders.same(builders.weights(state.network), start)))
    results = list(fit(state, builders.plan(epochs=2), hooks))
    assert seen == [False, False, True, False]  # after an epoch, two setbacks and an epoch
    assert [result.learning_rate for result in results] == [0.05, 0.0005]


def test_a_setback_comes_to_the_same_whenever_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> dict[str, Tensor]:
        state = builders.state(_deep(), rate=1.0)
        list(fit(state, builders.plan(epochs=3, augmentation="none")))
        assert state.setbacks == 2
        return builders.weights(state.network)

    at_the_end_of_the_epoch = train()
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    assert builders.same(train(), at_the_end_of_the_epoch)


@pytest.mark.parametrize(("setbacks", "step"), [(0, 6), (1, 6), (2, 6), (2, 9)])
def test_a_run_killed_around_a_setback_ends_with_the_weights_of_one_that_was_not(
    setbacks: int, step: int, storage: LocalStorage
) -> None:
    plan = builders.plan(epochs=3, augmentation="none")
    undisturbed = builders.state(_deep(), rate=1.0, ema=0.9)
    list(fit(undisturbed, plan))
    assert undisturbed.setbacks == 2

    killed = builders.state(_deep(), rate=1.0, ema=0.9)
    _run_until_step(killed, plan, step, setbacks=setbacks)
    Checkpoints(storage, job_id="job_1", fence=1).save(killed.tensors(), killed.numbers())
    resumed = builders.state(_deep(), rate=1.0, ema=0.9)
    found = Checkpoints(storage, job_id="job_1", fence=2).newest()
    assert found is not None
    resumed.restore(found.tensors, found.numbers)
    list(fit(resumed, plan))

    assert (resumed.setbacks, resumed.outcome) == (2, undisturbed.outcome)
    assert builders.same(builders.weights(resumed.network), builders.weights(undisturbed.network))


def test_a_last_batch_of_one_joins_the_batch_before_it_where_batch_norm_trains() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert trains_batch_norm(network)
    plan = builders.plan(train=builders.split(21), epochs=1, fewest=2)
    (result,) = fit(builders.state(network), plan)
    assert result.step == 4


def test_the_best_epoch_is_the_most_accurate_one_and_among_equals_the_one_of_least_loss() -> None:
    state = builders.state(builders.network())
    results = list(fit(state, builders.plan(epochs=6)))
    best = max(results, key=lambda r: (r.val_accuracy, -r.val_loss))
    assert state.best is not None
    assert (state.best.epoch, state.best.val_loss) == (best.epoch, best.val_loss)
    state.load_best()
    plan = builders.plan()
    logits = predict_logits(state.network, plan.val, normalise=plan.normalise, device=torch.device("cpu"))
    assert functional.cross_entropy(logits, torch.from_numpy(plan.val.labels)).item() == best.val_loss


def test_patience_ends_the_run_after_that_many_epochs_without_gain() -> None:
    state = builders.state(builders.network(), rate=1e-12)
    frozen_statistics = builders.plan(epochs=50, early_stopping_patience=3, augmentation="none")
    state.network[1].momentum = 0.0  # type: ignore[union-attr,index]
    assert len(list(fit(state, frozen_statistics))) == 1 + 3


def test_a_gain_is_what_chance_does_not_explain() -> None:
    # Of 150 pictures at 90 %, the standard error is 3.7 pictures.
    assert not is_gain(136 / 150, 135 / 150, images=150)
    assert is_gain(137 / 150, 135 / 150, images=150)
    assert not is_gain(135 / 150, 137 / 150, images=150)
    assert not is_gain(1.0, 1.0, images=150)
    assert is_gain(1.0, 149 / 150, images=150)


def test_the_budget_ends_the_run_after_the_epoch_that_spends_it() -> None:
    assert len(list(fit(builders.state(builders.network()), builders.plan(epochs=9, budget_seconds=1e-9)))) == 1


def test_a_budget_without_room_for_all_epochs_brings_the_rate_down_within_those_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, told = [0.0], []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def a_second_long(batch: Tensor) -> Tensor:
        clock[0] += 1.0
        return builders.prepared(batch)

    schedule = Schedule("cosine", 1000, 5, warmup_epochs=100.0)
    plan = builders.plan(epochs=1000, normalise=a_second_long, schedule=schedule, budget_seconds=100.0)
    hooks = Hooks(log=lambda message, _details: told.append(message))
    state = builders.state(builders.network(), rate=0.05)
    results = list(fit(state, plan, hooks))

    # An epoch has five steps and one batch of validation: six seconds, of which 95 hold fifteen.
    assert len(results) == state.epochs == 15
    assert results[-1].learning_rate < 0.01 * max(result.learning_rate for result in results)
    assert told == [
        "budget_seconds has room for about 15 of 1000 epochs: the learning rate comes down to its end within these."
    ]


Slow = Callable[[Callable[[int], float]], Callable[[Tensor], Tensor]]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """A loop whose clock is moved by its batches: seconds of each, by its number from 0."""
    clock, batches = [0.0], itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def taking(seconds: Callable[[int], float]) -> Callable[[Tensor], Tensor]:
        def normalise(batch: Tensor) -> Tensor:
            clock[0] += seconds(next(batches))
            return builders.prepared(batch)

        return normalise

    return taking


def cosine(**changes: Any) -> Plan:
    """Of a thousand epochs, each five steps and one batch of validation, a hundred seconds have room for few."""
    return builders.plan(epochs=1000, schedule=Schedule("cosine", 1000, 5), budget_seconds=100.0, **changes)


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [
        (lambda batch: 3.0 if batch < 6 else 1.0, 13),  # 18 s, and in the 77 left 12 of 6 s
        (lambda batch: 1.0 if batch < 6 else 3.0, 5),  # 6 s, and in the 89 left 4 of 18 s
    ],
)
def test_a_first_epoch_unlike_the_others_is_corrected(slow: Slow, seconds: Callable[[int], float], epochs: int) -> None:
    state = builders.state(builders.network())
    results = list(fit(state, cosine(normalise=slow(seconds))))
    assert len(results) == state.epochs == epochs
    assert results[-1].learning_rate < 0.01 * results[0].learning_rate
    assert sum(result.seconds for result in results) <= 100


def test_an_epoch_that_outlasts_the_budget_is_cut_off_and_counts(slow: Slow) -> None:
    state = builders.state(builders.network())
    results = list(fit(state, cosine(normalise=slow(lambda batch: 1.0 if batch < 12 else 40.0))))
    # After two epochs of 6 s the third has room for three steps.
    assert [result.step for result in results] == [5, 10, 13]
    assert state.is_finished


def test_validating_the_start_is_no_part_of_an_epoch_but_of_the_budget(slow: Slow) -> None:
    state = builders.state(builders.network())
    plan = cosine(normalise=slow(lambda batch: 40.0 if batch == 0 else 1.0), start_counts=True)
    results = list(fit(state, plan))
    assert {result.seconds for result in results} == {6.0}
    assert len(results) == 9  # in the 55 s that are left
    assert state.elapsed_seconds == 40 + 9 * 6


def test_what_a_setback_threw_away_is_no_part_of_an_epoch_but_of_the_budget(slow: Slow) -> None:
    state = builders.state(NoNumberAt(3))
    results = list(fit(state, cosine(normalise=slow(lambda _batch: 1.0))))
    assert state.setbacks == 1
    assert {result.seconds for result in results} == {6.0}
    assert len(results) == 15  # in the 91 s that are left
    assert state.elapsed_seconds == 4 + 15 * 6


def test_a_run_that_ends_where_a_short_budget_is_told_goes_on_with_each_epoch_once(slow: Slow) -> None:
    class Left(Exception):
        pass

    def leave(_message: str, _details: object) -> None:
        raise Left

    plan, state = cosine(normalise=slow(lambda _batch: 1.0)), builders.state(builders.network())
    results: list[EpochResult] = []
    with pytest.raises(Left):
        results.extend(fit(state, plan, Hooks(log=leave)))
    again = builders.state(builders.network())
    again.restore(state.tensors(), state.numbers())
    results.extend(fit(again, plan))
    assert [result.epoch for result in results] == list(range(1, 16))
    assert again.val_accuracies == [result.val_accuracy for result in results]


def test_a_shortened_schedule_survives_a_kill(slow: Slow) -> None:
    plan = cosine(normalise=slow(lambda _batch: 1.0))
    whole = builders.state(builders.network())
    list(fit(whole, plan))
    state = builders.state(builders.network())
    fitted = fit(state, plan)
    next(fitted)
    fitted.close()
    again = builders.state(builders.network())
    again.restore(state.tensors(), state.numbers())
    assert again.epochs == 15
    list(fit(again, plan))
    assert again.epoch == 15
    assert builders.same(builders.weights(again.network), builders.weights(whole.network))


def test_a_budget_with_room_for_all_epochs_changes_nothing() -> None:
    bounded, free = builders.state(builders.network()), builders.state(builders.network())
    list(fit(bounded, builders.plan(budget_seconds=1e6)))
    list(fit(free, builders.plan()))
    assert builders.same(builders.weights(bounded.network), builders.weights(free.network))


def test_a_stop_within_the_first_epoch_validates_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    state = builders.state(builders.network())
    (result,) = fit(state, builders.plan(epochs=9), Hooks(on_progress=lambda _progress: True))
    assert (result.epoch, result.step, result.is_best) == (1, 1, True)
    assert state.is_finished


def test_a_stop_later_keeps_the_best_epoch_and_yields_no_part_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    state = builders.state(builders.network())
    results = list(fit(state, builders.plan(epochs=9), Hooks(on_progress=lambda progress: progress.epoch == 3)))
    assert [result.epoch for result in results] == [1, 2]
    assert state.best is not None


def test_a_checkpoint_is_due_at_each_epochs_end_and_after_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    saved: list[tuple[int, int]] = []
    hooks = Hooks(save=lambda state: saved.append((state.epoch, state.step)), checkpoint_seconds=0.0)
    list(fit(builders.state(builders.network()), builders.plan(), hooks))
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 0)]


def test_after_every_step_and_every_batch_of_validation_is_a_moment_to_give_way() -> None:
    moments: list[tuple[int, int]] = []
    state = builders.state(builders.network())
    hooks = Hooks(on_step=lambda: moments.append((state.epoch, state.step)))
    list(fit(state, builders.plan(epochs=1), hooks))
    steps, validation = moments[:5], moments[5:]
    assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert len(validation) > 0
    assert set(validation) == {(0, 5)}


def test_batch_norm_of_a_frozen_part_keeps_its_statistics() -> None:
    network = builders.network()
    frozen = network[1]
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    frozen.train = lambda mode=True: frozen  # type: ignore[method-assign]
    nn.Module.train(frozen, False)
    state = builders.state(network)
    before = builders.weights(frozen)
    list(fit(state, builders.plan()))
    assert builders.same(builders.weights(frozen), before)
    assert not any(name.startswith("1.") for name in state.live)


def test_the_average_of_the_weights_is_what_is_validated_and_kept() -> None:
    state = builders.state(builders.network(), ema=0.5)
    list(fit(state, builders.plan(epochs=1)))
    assert state.best is not None
    assert state.ema is not None
    assert builders.same(state.best.weights, {name: t.contiguous() for name, t in state.ema.items()})
    assert not builders.same(state.best.weights, builders.weights(state.network))


def test_the_average_moves_as_far_in_four_steps_at_once_as_in_four() -> None:
    at_once, one_by_one = ({"a": torch.zeros(3), "count": torch.tensor(0)} for _ in range(2))
    live = {"a": torch.tensor([1.0, -2.0, 3.0]), "count": torch.tensor(7)}
    move_average(at_once, live, decay=0.9, steps=range(100, 104))
    for step in range(100, 104):
        move_average(one_by_one, live, decay=0.9, steps=range(step, step + 1))
    assert torch.allclose(at_once["a"], (1 - 0.9**4) * live["a"])
    assert torch.allclose(at_once["a"], one_by_one["a"])
    assert at_once["count"] == one_by_one["count"] == 7


def test_no_step_of_an_epoch_is_left_out_of_the_average() -> None:
    state = builders.state(builders.network(), ema=1e-9)  # it holds on to nothing
    plan = builders.plan(epochs=1)
    list(fit(state, plan))
    assert state.total_steps % AVERAGED_STEPS != 0
    assert state.best is not None
    for name, tensor in state.live.items():
        assert torch.allclose(state.best.weights[name], tensor, atol=1e-7), name


def test_no_step_counts_twice_in_the_average_where_a_run_ends_in_validation_and_goes_on() -> None:
    class Left(Exception):
        pass

    undisturbed, left, resumed = (builders.state(builders.network(), ema=0.9) for _ in range(3))
    list(fit(undisturbed, builders.plan()))

    moments = 0

    def leave_in_the_first_validation() -> None:
        nonlocal moments
        moments += (left.epoch, left.step) == (0, 5)
        if moments == 2:  # the first is after the step
            raise Left

    with pytest.raises(Left):
        list(fit(left, builders.plan(), Hooks(on_step=leave_in_the_first_validation)))
    assert left.step % AVERAGED_STEPS != 0
    resumed.restore(left.tensors(), left.numbers())
    list(fit(resumed, builders.plan()))

    assert undisturbed.ema is not None
    assert resumed.ema is not None
    assert builders.same(undisturbed.ema, resumed.ema)
    assert undisturbed.best is not None
    assert resumed.best is not None
    assert builders.same(undisturbed.best.weights, resumed.best.weights)


def test_a_checkpoint_that_does_not_say_how_far_the_average_is_goes_on_as_it_was_written() -> None:
    state = builders.state(builders.network(), ema=0.9)
    hooks = Hooks(on_progress=lambda _progress: True)
    list(fit(state, builders.plan(), hooks))
    state.step, state.total_steps = 3, 11
    numbers = {name: value for name, value in state.numbers().items() if name != "averaged_steps"}

    state.restore(state.tensors(), numbers)
    assert state.averaged_steps == 8


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_network_that_has_been_elsewhere_and_back_goes_on_and_gets_its_best_weights(ema: float) -> None:
    def run(*, moves: bool) -> dict[str, torch.Tensor]:
        state = builders.state(builders.network(), ema=ema)
        for _epoch in fit(state, builders.plan(epochs=3)):
            for parameter in state.network.parameters() if moves else ():
                parameter.data = parameter.data.clone()  # as a device's memory is another one each time
        state.load_best()
        return builders.weights(state.network)

    assert builders.same(run(moves=True), run(moves=False))


def test_progress_tells_the_share_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    seen: list[StepProgress] = []

    def watch(progress: StepProgress) -> bool:
        seen.append(progress)
        return False

    list(fit(builders.state(builders.network()), builders.plan(), Hooks(on_progress=watch)))
    assert [round(p.fraction, 6) for p in seen] == sorted(round(p.fraction, 6) for p in seen)
    assert (seen[0].fraction, seen[-1].fraction) == (pytest.approx(0.1), 1.0)
    assert all(p.images_per_second is None or math.isfinite(p.images_per_second) for p in seen)


def _run_until_step(state: LoopState, plan: object, steps: int, *, setbacks: int = 0) -> None:
    """Leaves the run after that many steps, by an exception from its own report, as a shutdown does."""

    class Left(Exception):
        pass

    def leave(_progress: StepProgress) -> bool:
        if (state.total_steps, state.setbacks) == (steps, setbacks):
            raise Left
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
        with pytest.raises(Left):
            list(fit(state, plan, Hooks(on_progress=leave)))  # type: ignore[arg-type]


def _tensors(source: Source, positions: np.ndarray) -> Tensor:
    return builders.plan().normalise(source.batch(positions).inputs)


def test_plans_are_replaced_not_changed() -> None:
    plan = builders.plan()
    assert replace(plan, epochs=9).epochs == 9
    assert plan.epochs == 2
