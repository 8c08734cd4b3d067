"""The training loop: `fit` yields one EpochResult per epoch, and can be left and taken up again at any step.

All that changes while training is a LoopState: random numbers follow from (seed, epoch, step), the learning rate from
the step. Knows networks and batches; not jobs, not storage: whoever drives it is asked through Hooks.
"""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.vision.device import pass_batch_size
from app.vision.recording import may_record
from worker.training.augment import cutmix, mixup
from worker.training.graphs import Lead, RecordedPasses
from worker.training.optim import Schedule, set_learning_rates
from worker.training.pixels import (
    MIX,
    NETWORK,
    Batch,
    Kept,
    KeptSource,
    Source,
    TrainingBatches,
    ordered_batches,
    prefetched,
    random_stream,
    steps_per_epoch,
    torch_seed,
)
from worker.training.precision import Precision, autocast
from worker.training.state import AVERAGED_STEPS, EpochResult, LoopState, Measured, copy_into
from worker.training.tasks import Tasks

MAX_HALVINGS = 4
MAX_SETBACKS = 2
TICK_SECONDS = 1.0
CHECKPOINT_SECONDS = 60.0
# Share of a budget that is planned with; the rest is for epochs that take longer than the one before.
_USABLE_BUDGET = 0.95


@dataclass(frozen=True)
class Plan:
    """What stays the same over the whole run.

    normalise: a batch's inputs on the device -> what the network takes: for pixels float32, as serving does it.
    class_weights: one per output, or None. fewest: images that a step needs, as batch_positions has it.
    start_counts: the weights at the start are a candidate too, as epoch 0. measure: validation, where it is not
    cross-entropy and accuracy on `val`; then the network gives each image's loss and no logits, labels are not looked
    at, and the last epoch counts as the best: no figure would say which is.
    """

    train: Source
    val: Source
    tasks: Tasks
    epochs: int
    batch_size: int
    seed: int
    schedule: Schedule
    normalise: Callable[[Tensor], Tensor]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    early_stopping_patience: int | None = None
    budget_seconds: float | None = None
    fewest: int = 1
    start_counts: bool = False
    measure: Callable[[Callable[[], None]], Measured] | None = None

    def shortened(self, epochs: int | None) -> "Plan":
        """The same in at most so many epochs, its schedule ending with them."""
        if epochs is None or epochs >= self.epochs:
            return self
        return replace(self, epochs=epochs, schedule=self.schedule.shortened(epochs))


@dataclass(frozen=True)
class StepProgress:
    """Where a run is. epoch counts from 1; fraction is of the whole run; images_per_second over the last seconds."""

    epoch: int
    epochs: int
    fraction: float
    images_per_second: float | None
    eta_seconds: float | None


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of whoever drives it.

    on_progress: called about once a second; may raise to leave; True asks to end with the best epoch so far.
    save: called with the state at checkpoints. log: something worth telling happened. on_step: called after every step
    and every batch of validation; may wait.
    """

    on_progress: Callable[[StepProgress], bool] = lambda _progress: False
    save: Callable[["LoopState"], None] = lambda _state: None
    log: Callable[[str, Mapping[str, Any]], None] = lambda _message, _details: None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    on_step: Callable[[], object] = lambda: None


class _Diverged(Exception):
    """The loss of the running epoch is no number any more."""


@dataclass(frozen=True)
class _Held:
    """What is in a GPU's memory for speed alone: recorded steps and validation passes, and what goes through them."""

    steps: RecordedPasses
    validation: RecordedPasses
    data: Kept

    def give_up(self) -> bool:
        """Returns whether there was anything."""
        return any([self.steps.give_up(), self.validation.give_up(), self.data.give_up()])


def fit(state: LoopState, plan: Plan, hooks: Hooks | None = None) -> Generator[EpochResult, None, None]:
    """Trains from wherever `state` is to the end; after each epoch's validation yields its result.

    Ends early on hooks.on_progress's word, by patience or by budget; then state.is_finished is true and state.best set.
    A budget that has no room for all epochs shortens the schedule as soon as that can be told, and each epoch says anew
    how many there is room for: so the learning rate still comes down to its end, where most is gained.
    Where the loss is no number any more, goes on from the best epoch, or the start, with a tenth of the learning rates.
    Raises JobFailed: `diverged` where that has not helped twice, `out_of_memory` where smaller batches did not help.
    """
    hooks = hooks or Hooks()
    pace = _Pace(state, plan, hooks)
    kept = Kept.within_reason(state.device)
    if state.device.type == "cuda":
        plan = replace(plan, train=plan.train.keeping(kept), val=KeptSource(plan.val, kept))

    def recorded(function: Callable[..., tuple[Tensor, ...]]) -> RecordedPasses:
        told = "Passes of this network cannot be recorded as a CUDA graph."
        return RecordedPasses(function, state.network, lambda why: hooks.log(told, {"why": why}))

    held = _Held(
        recorded(partial(_pass, state, plan)),
        recorded(partial(_forward, state.network, plan.normalise, state.precision)),
        kept,
    )
    feed = TrainingBatches(
        plan.train,
        batch_size=plan.batch_size,
        seed=plan.seed,
        epochs=plan.epochs,
        fewest=plan.fewest,
        device=state.device,
    )
    with closing(feed):
        yield from _epochs(state, plan, pace, held, feed)


def _epochs(
    state: LoopState, plan: Plan, pace: "_Pace", held: _Held, feed: TrainingBatches
) -> Generator[EpochResult, None, None]:
    if plan.start_counts and state.best is None and state.total_steps == 0:
        try:
            start = _validate(state, plan, pace, held)
        except _Diverged:
            raise _diverged("before the first step") from None
        state.keep_if_best(0, val_accuracy=start.accuracy, val_loss=start.loss)
        pace.set_aside()
    while not state.is_finished:
        try:
            stop = _train_epoch(state, plan, pace, held, feed)
            if stop and state.epoch > 0 and not pace.is_budget_spent():
                state.is_finished = True
                return
            # Asked to stop within the first epoch, or out of time at the end of a shortened schedule: the weights as
            # they are get validated, so that there is a result.
            with _averaged(state):
                result = _end_epoch(state, plan, pace, _validate(state, plan, pace, held))
        except _Diverged:
            _go_back(state, pace)
            continue
        state.is_finished = (
            stop
            or state.epoch >= pace.plan.epochs
            or (plan.early_stopping_patience is not None and state.epochs_without_gain >= plan.early_stopping_patience)
            or pace.is_budget_spent()
        )
        # First told, then saved: killed in between, the epoch is trained again and its record replaced, never missing.
        yield result
        if state.epoch == 1:
            pace.tell_of_budget()
        pace.save()


_PARTS = {1: "a tenth", 2: "a hundredth"}


def _go_back(state: LoopState, pace: "_Pace") -> None:
    """Raises JobFailed where that has been done often enough."""
    if state.setbacks == MAX_SETBACKS:
        raise _diverged(f"any more, with {_PARTS[state.setbacks]} of the learning rates too")
    pace.set_aside()
    epoch = state.go_back()
    pace.hooks.log(
        "The loss is no longer a number: training has diverged. It goes on from "
        f"{f'the best epoch, {epoch}' if epoch else 'the start'}, with {_PARTS[state.setbacks]} of the learning rates.",
        {"setbacks": state.setbacks, "epoch": state.epoch + 1, "learning_rates_divided_by": state.rate_divisor},
    )
    pace.save()


def _train_epoch(state: LoopState, plan: Plan, pace: "_Pace", held: _Held, feed: TrainingBatches) -> bool:
    """The rest of the running epoch. Returns whether it was asked to end the run."""
    state.network.train()
    held.steps.follow()
    lead = Lead(state.device)
    with _threads_for(plan.train, state.device):
        for batch in feed.rest_of(state.epoch, state.step):
            set_learning_rates(state.optimizer, pace.plan.schedule, state.total_steps, divisor=state.rate_divisor)
            _step_in_memory(state, plan, batch, held, pace.hooks)
            state.step += 1
            state.total_steps += 1
            if state.step % AVERAGED_STEPS == 0:
                state.average()
            lead.after_step()
            if pace.after_step(len(batch)):
                return True
    return False


@contextmanager
def _threads_for(source: Source, device: torch.device) -> Iterator[None]:
    """One thread for steps on what is light: two take twice as long, since each operation waits for both."""
    if device.type != "cpu" or not source.is_light:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _step_in_memory(state: LoopState, plan: Plan, batch: Batch, held: _Held, hooks: Hooks) -> None:
    """One optimiser step; out of memory, the same again: without what is held for speed, then in smaller pieces."""
    halvings = 0
    while not _attempt(lambda: _step(state, plan, batch, held.steps)):
        # Here, outside any except block, nothing holds the failed attempt's tensors any more.
        state.optimizer.zero_grad(set_to_none=True)
        if _make_room(state.device, held):
            continue
        halvings += 1
        if halvings > MAX_HALVINGS or len(batch) // (2 * state.micro_batches) < 2:
            raise _out_of_memory(plan)
        state.micro_batches *= 2
        hooks.log(
            f"Out of memory: batches of {plan.batch_size} are now computed in {state.micro_batches} parts; "
            "their effect on the model stays the same.",
            {"micro_batches": state.micro_batches},
        )


def _make_room(device: torch.device, held: _Held) -> bool:
    """Returns whether anything was given up for it."""
    had_any = held.give_up()
    if may_record(device):  # after a recording that broke, torch refuses
        torch.cuda.empty_cache()
    return had_any


def _step(state: LoopState, plan: Plan, batch: Batch, passes: RecordedPasses) -> None:
    _seed_network(state.device, (_epoch_seed(plan.seed, state.epoch) + state.step) % 2**63)
    labels = batch.labels.to(state.device, non_blocking=True)
    images = plan.normalise(batch.inputs.to(state.device, non_blocking=True))
    images, targets = _mixed(state, plan, images, labels)
    if state.micro_batches == 1:
        found = [passes(images, targets, labels)]
    else:
        scale = plan.tasks.scale(targets, _class_weights(state, plan))
        state.optimizer.zero_grad(set_to_none=True)
        found = [
            _pass(state, plan, images[part], targets[part], labels[part], scale)
            for part in _parts(len(labels), state.micro_batches)
        ]
    state.optimizer.step()
    # Last, so that an attempt that runs out of memory is counted once.
    loss_sum, right, images_seen = state.sums.unbind()
    for loss, right_here in found:
        loss_sum.add_(loss, alpha=len(labels))
        right.add_(right_here)
    images_seen.add_(len(labels))


def _pass(
    state: LoopState, plan: Plan, images: Tensor, targets: Tensor, labels: Tensor, scale: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Forward and backward. Returns the share of the mean loss, and how many are right.

    scale: what the whole batch's sum of losses is divided by, where these are a part of it: summed over parts, the
    gradient is the whole batch's.
    """
    weights = _class_weights(state, plan)
    with autocast(state.device, state.precision):
        output = state.network(images)
    if plan.measure is not None:
        losses, right = output.float(), torch.zeros((), device=state.device)
    else:
        losses = plan.tasks.losses(output.float(), targets, weights=weights, label_smoothing=plan.label_smoothing)
        right = plan.tasks.right(output.detach(), labels).sum()
    loss = losses.sum() / (plan.tasks.scale(targets, weights) if scale is None else scale)
    loss.backward()
    return loss.detach(), right


def _class_weights(state: LoopState, plan: Plan) -> Tensor | None:
    return None if plan.class_weights is None else _on_device(plan.class_weights, state.device)


@lru_cache(maxsize=1)  # mixing a seed takes a tenth of the step of a head
def _epoch_seed(seed: int, epoch: int) -> int:
    return torch_seed(seed, NETWORK, epoch)


def _seed_network(device: torch.device, seed: int) -> None:
    """For what the network draws itself: dropout, stochastic depth."""
    # torch.manual_seed would also note the whole call stack for kinds of device that may come: half a millisecond.
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.default_generator.manual_seed(seed)
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _mixed(state: LoopState, plan: Plan, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where both mixtures are on, each batch takes one of the two at random."""
    if plan.mixup == 0 and plan.cutmix == 0:
        return images, labels
    one_hot = plan.tasks.one_hot(labels).to(images.dtype)
    random = random_stream(plan.seed, MIX, state.epoch, state.step)
    if plan.mixup == 0 or (plan.cutmix > 0 and random.random() < 0.5):
        return cutmix(images, one_hot, alpha=plan.cutmix, random=random)
    return mixup(images, one_hot, alpha=plan.mixup, random=random)


@lru_cache(maxsize=8)  # else each step would wait for a copy to the device
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _parts(count: int, parts: int) -> list[slice]:
    """Nearly equal slices of range(count), none with one image, which batch-norm cannot train on."""
    parts = max(1, min(parts, count // 2))
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


@contextmanager
def _averaged(state: LoopState) -> Iterator[None]:
    """The network with its averaged weights, where there are any; its own are back at the end."""
    if state.ema is None:
        yield
        return
    state.average()
    own = {name: tensor.clone() for name, tensor in state.live.items()}
    copy_into(state.live, state.ema)
    try:
        yield
    finally:
        copy_into(state.live, own)


def _validate(state: LoopState, plan: Plan, pace: "_Pace", held: _Held) -> Measured:
    """Mean loss and accuracy on the validation images, or what the plan measures in their place.

    Raises _Diverged where the loss is no number.
    """
    held.validation.follow()
    measure = plan.measure or (lambda on_batch: _accuracy(state, plan, held, on_batch))
    found = measure(pace.during_validation)
    if not math.isfinite(found.loss):
        raise _Diverged
    return found


def _accuracy(state: LoopState, plan: Plan, held: _Held, on_batch: Callable[[], None]) -> Measured:
    state.network.eval()
    make_room = partial(_make_room, state.device, held)
    logits = _passed(held.validation, plan.val, device=state.device, on_batch=on_batch, make_room=make_room)
    return measured(plan.tasks, logits, torch.from_numpy(plan.val.labels))


def measured(tasks: Tasks, logits: Tensor, labels: Tensor) -> Measured:
    """By cross-entropy and accuracy, of several tasks each one's too. logits: float32 (N, C); labels: as Tasks."""
    figures = {f"val_accuracy:{name}": value for name, value in tasks.accuracies(logits, labels).items()}
    return Measured(tasks.mean_loss(logits, labels).item(), tasks.accuracy(logits, labels), figures)


def predict_logits(
    network: nn.Module,
    source: Source,
    *,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: Precision = "fp32",
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits, or whatever the network gives, of the whole source in its own order: float32 (N, C) on the CPU.

    Leaves the network in eval mode.
    """
    network.eval()
    return _passed(partial(_forward, network, normalise, precision), source, device=device, on_batch=on_batch)


def _forward(
    network: nn.Module, normalise: Callable[[Tensor], Tensor], precision: Precision, inputs: Tensor
) -> tuple[Tensor]:
    with autocast(inputs.device, precision):
        return (network(normalise(inputs)).float(),)


def _passed(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    source: Source,
    *,
    device: torch.device,
    on_batch: Callable[[], None],
    make_room: Callable[[], bool] = lambda: False,
) -> Tensor:
    """What a forward pass gives for the whole source: float32 (N, C) on the CPU.

    make_room: gives up what is in the device's memory for speed alone. Returns whether there was anything.
    """
    batch_size = pass_batch_size(device.type)
    found: list[Tensor] = []

    def run(start: int, batch: Batch) -> None:
        del found[start:]
        for inputs in torch.split(batch.inputs, batch_size):
            (output,) = forward(inputs.to(device, non_blocking=True))
            found.append(output.cpu())

    prepared = ordered_batches(source, batch_size=batch_size, device=device)
    with torch.inference_mode(), closing(prefetched(prepared, device=device)) as batches:
        for batch in batches:
            start = len(found)
            while not _attempt(lambda start=start, batch=batch: run(start, batch)):  # type: ignore[misc]
                if make_room():
                    continue
                if batch_size == 1:
                    raise _out_of_memory(None)
                batch_size //= 2
            on_batch()
    return torch.cat(found)


def _end_epoch(state: LoopState, plan: Plan, pace: "_Pace", found: Measured) -> EpochResult:
    val_loss, val_accuracy = found.loss, found.accuracy
    loss_sum, correct, count = state.sums.tolist()  # waits for the device, so once per epoch
    if not math.isfinite(loss_sum):
        raise _Diverged
    is_best = state.keep_if_best(state.epoch + 1, val_accuracy=val_accuracy, val_loss=val_loss)
    if val_accuracy is not None:
        state.val_accuracies.append(val_accuracy)
    assert state.best is not None
    seconds = pace.end_epoch()
    state.epoch += 1
    state.step = 0
    state.sums.zero_()
    if val_accuracy is not None and is_gain(val_accuracy, state.reached_accuracy, images=len(plan.val)):
        state.reached_accuracy, state.epochs_without_gain = val_accuracy, 0
    else:
        state.epochs_without_gain += 1
    return EpochResult(
        epoch=state.epoch,
        train_loss=loss_sum / count,
        train_accuracy=None if plan.measure is not None else correct / count,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        learning_rate=state.optimizer.param_groups[0]["lr"],
        seconds=seconds,
        images_per_second=count / max(seconds, 1e-9),
        is_best=is_best,
        best_epoch=state.best.epoch,
        best_val_accuracy=state.best.val_accuracy,
        best_val_loss=state.best.val_loss,
        step=state.total_steps,
        figures=found.figures,
    )


def is_gain(val_accuracy: float, reached: float, *, images: int) -> bool:
    """Whether training went on, and not only up and down: by half a standard error of the accuracy, or more.

    The best epoch is kept by whatever it is better; this says whether to wait for another one.
    """
    return val_accuracy - reached > 0.5 * math.sqrt(val_accuracy * (1 - val_accuracy) / images)


class _Pace:
    """The clock of a run: when to report and save, how fast it goes. Nothing here changes a number of the model."""

    def __init__(self, state: LoopState, plan: Plan, hooks: Hooks) -> None:
        self.hooks = hooks
        self._state = state
        self._whole_plan = plan
        self.plan = plan.shortened(state.epochs)
        self._steps = steps_per_epoch(len(plan.train), plan.batch_size, fewest=plan.fewest)
        now = time.monotonic()
        self._mark = self._window_start = self._reported = self._saved = now
        self._window_images = 0
        self._images_per_second: float | None = None
        self._began, self._first_fraction = now, self._fraction()

    def after_step(self, images: int) -> bool:
        """Reports and saves where it is time. Returns whether the run was asked to end."""
        self._window_images += images
        self.hooks.on_step()
        now = time.monotonic()
        if now - self._reported < TICK_SECONDS:
            return False
        self._images_per_second = self._window_images / (now - self._window_start)
        self._window_start, self._window_images = now, 0
        # Waits for the device, so about once a second.
        if not math.isfinite(self._state.sums[0].item()):
            raise _Diverged
        if self._whole_plan.budget_seconds is not None:
            self._count_time()
            if self._state.epoch == 0:
                # Looking costs a third of training: one pass of three.
                looking = len(self.plan.val) / (3 * len(self.plan.train))
                training = self._state.epoch_seconds * self._steps / self._state.step
                self._fit_into_budget(training * (1 + looking), done=0)
        if now - self._saved >= self.hooks.checkpoint_seconds:
            self.save()
        return self._report(now) or self.is_budget_spent()

    def during_validation(self) -> None:
        self.hooks.on_step()
        now = time.monotonic()
        if now - self._reported >= TICK_SECONDS:
            self._report(now)

    def save(self) -> None:
        self._count_time()
        self.hooks.save(self._state)
        self._saved = time.monotonic()
        # It may have waited for room, and the run been asked to end meanwhile: the next step looks.
        self._reported = -math.inf

    def set_aside(self) -> None:
        """What came before the first epoch, or was thrown away: it took its time and tells nothing of an epoch's."""
        self._end_span()

    def end_epoch(self) -> float:
        """Seconds of the epoch that ends now, training and validation, over all attempts."""
        seconds = self._end_span()
        self._fit_into_budget(seconds, done=self._state.epoch + 1)
        return seconds

    def tell_of_budget(self) -> None:
        if self.plan.epochs < self._whole_plan.epochs:
            self.hooks.log(
                f"budget_seconds has room for about {self.plan.epochs} of {self._whole_plan.epochs} epochs: the "
                "learning rate comes down to its end within these.",
                {"epochs": self.plan.epochs},
            )

    def is_budget_spent(self) -> bool:
        budget = self._whole_plan.budget_seconds
        return budget is not None and self._state.elapsed_seconds + self._state.epoch_seconds >= budget

    def _fit_into_budget(self, epoch_seconds: float, *, done: int) -> None:
        """Shortens the schedule to the epochs that are done, and those that there is time for at so many seconds."""
        budget = self._whole_plan.budget_seconds
        if budget is None:
            return
        left = max(0.0, _USABLE_BUDGET * budget - self._state.elapsed_seconds)
        room = max(1, done + math.floor(left / max(epoch_seconds, 1e-9)))
        self._state.epochs = min(room, self._whole_plan.epochs)
        self.plan = self._whole_plan.shortened(self._state.epochs)

    def _end_span(self) -> float:
        self._count_time()
        seconds, self._state.epoch_seconds = self._state.epoch_seconds, 0.0
        self._state.elapsed_seconds += seconds
        return seconds

    def _count_time(self) -> None:
        now = time.monotonic()
        self._state.epoch_seconds += now - self._mark
        self._mark = now

    def _report(self, now: float) -> bool:
        self._reported = now
        fraction = self._fraction()
        gained = fraction - self._first_fraction
        return self.hooks.on_progress(
            StepProgress(
                epoch=min(self._state.epoch + 1, self.plan.epochs),
                epochs=self.plan.epochs,
                fraction=fraction,
                images_per_second=self._images_per_second,
                eta_seconds=(now - self._began) / gained * (1 - fraction) if gained > 0 else None,
            )
        )

    def _fraction(self) -> float:
        return min(1.0, (self._state.epoch + self._state.step / self._steps) / self.plan.epochs)


def trains_batch_norm(network: nn.Module) -> bool:
    """Whether any batch-norm uses the statistics of its batch: those need two images or more."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in network.modules())


def _attempt(action: Callable[[], None]) -> bool:
    """Runs it. Returns False where memory ran out; other errors pass."""
    try:
        action()
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except RuntimeError as error:
        # CPU allocators and some CUDA libraries say it in words only.
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return False
        raise
    return True


def _diverged(when: str) -> JobFailed:
    return JobFailed(
        f"Training diverged: its loss is no number {when}. Use a far lower learning_rate, warmup_epochs of 1 or more, "
        "or another backbone.",
        code="diverged",
        title="Training diverged",
    )


def _out_of_memory(plan: Plan | None) -> JobFailed:
    size = f" (now {plan.batch_size})" if plan else ""
    return JobFailed(
        f"There is not enough memory, even for smaller batches. Use a smaller batch_size{size} or image_size, or a "
        "smaller backbone.",
        code="out_of_memory",
        title="Out of memory",
    )
