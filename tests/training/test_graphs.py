"""Passes as CUDA graphs against the same passes kernel by kernel; with no GPU, that nothing changes."""

import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.training import graphs, loop
from worker.training.graphs import RECORD_AFTER, Lead, RecordedPasses
from worker.training.loop import Hooks, fit
from worker.training.optim import build_optimizer
from worker.training.pixels import Batch, Kept, prefetched, training_batches
from worker.training.state import LoopState


def passes_of(network: nn.Module, *, refused: list[str] | None = None, syncs: bool = False) -> RecordedPasses:
    def function(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = network(images)
        if syncs:
            output = output * float(images.sum().item() > -1e9)
        loss = nn.functional.cross_entropy(output, labels)
        loss.backward()
        return loss.detach(), (output.argmax(1) == labels).sum()

    return RecordedPasses(function, network, (lambda _why: None) if refused is None else refused.append)


def batch(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=random).to(device), torch.randint(
        0, 3, (count,), generator=random
    ).to(device)


def state_on(device: torch.device, *, dropout: float = 0.0, optimizer: str = "adamw", ema: float = 0.0) -> LoopState:
    network = builders.network(dropout=dropout).to(device)
    built = build_optimizer(
        [(network, 0.01)],
        optimizer="sgd" if optimizer == "sgd" else "adamw",
        momentum=0.9 if optimizer == "sgd" else None,
        weight_decay=0.01,
        device_type=device.type,
    )
    return LoopState.begin(network, built, precision="fp32", ema=ema)


def test_each_call_has_the_gradients_of_that_call_alone_and_a_frozen_part_has_none() -> None:
    network = builders.network()
    network[0].requires_grad_(False)
    passes = passes_of(network)
    for seed in range(2):
        loss, _right = passes(*batch(6, seed, torch.device("cpu")))
        twin = builders.network()
        expected = nn.functional.cross_entropy(
            twin.train()(batch(6, seed, torch.device("cpu"))[0]), batch(6, seed, torch.device("cpu"))[1]
        )
        expected.backward()
        assert loss == pytest.approx(expected.item())
        assert network[0].weight.grad is None
        torch.testing.assert_close(network[6].weight.grad, twin[6].weight.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_recorded_pass_gives_the_losses_and_gradients_of_one_that_is_not(cuda: torch.device, dropout: float) -> None:
    recorded, plain = (builders.network(dropout=dropout).to(cuda) for _ in range(2))
    passes, eager = passes_of(recorded), passes_of(plain).plainly
    for step in range(RECORD_AFTER + 6):
        count = 8 if step % 2 else 5
        for one, network in ((passes, recorded), (eager, plain)):
            torch.manual_seed(step)
            images, labels = batch(count, step, cuda)
            found = [each.clone() for each in one(images, labels)]
            if one is passes:
                ours, our_grads = found, [p.grad.clone() for p in network.parameters() if p.grad is not None]
            else:
                torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-5)
                theirs = [p.grad for p in network.parameters() if p.grad is not None]
                torch.testing.assert_close(our_grads, theirs, rtol=1e-3, atol=1e-4)
    assert len(passes._recordings) == 2
    torch.testing.assert_close(recorded.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_other_threads_may_use_the_device_while_a_pass_is_recorded(cuda: torch.device) -> None:
    network = builders.network().to(cuda)
    ended = threading.Event()
    errors: list[BaseException] = []

    def busy() -> None:
        try:
            while not ended.is_set():
                torch.randn(50, 50).pin_memory().to(cuda, non_blocking=True).mm(
                    torch.ones(50, 50, device=cuda)
                ).sum().item()
        except BaseException as error:  # noqa: BLE001 (told by the test)
            errors.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        refused: list[str] = []
        for size in range(4, 8):
            passes = passes_of(network, refused=refused)
            for step in range(RECORD_AFTER + 3):
                passes(*batch(size, step, cuda))
            assert len(passes._recordings) == 1
    finally:
        ended.set()
        thread.join()
    assert (refused, errors) == ([], [])


def test_what_cannot_be_recorded_is_told_once_and_this_process_goes_on_kernel_by_kernel(cuda: torch.device) -> None:
    # In a process of its own, since torch records nothing more where it has failed to.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_fail_to_record).result(timeout=120)


def _fail_to_record() -> None:
    cuda, refused = torch.device("cuda"), []
    passes = passes_of(builders.network().to(cuda), refused=refused, syncs=True)
    losses = [passes(*batch(5, 0, cuda))[0].item() for _ in range(RECORD_AFTER + 4)]
    assert len(refused) == 1
    assert max(losses) - min(losses) < 1e-5
    torch.manual_seed(0)
    first = torch.randn(5, device=cuda)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(5, device=cuda), first)
    others = passes_of(builders.network(dropout=0.5).to(cuda), refused=refused)
    assert all(others(*batch(5, 0, cuda))[0].isfinite() for _ in range(RECORD_AFTER + 4))
    assert (len(others._recordings), len(refused)) == (0, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_of_recorded_steps_ends_with_the_weights_of_one_kernel_by_kernel(
    cuda: torch.device, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(record_after: int) -> tuple[LoopState, list[float]]:
        monkeypatch.setattr(graphs, "RECORD_AFTER", record_after)
        state = state_on(cuda, dropout=0.2, optimizer=optimizer, ema=0.9)
        plan = builders.plan(epochs=8, mixup=0.2, cutmix=1.0, label_smoothing=0.1, class_weights=(1.0, 2.0, 1.5))
        return state, [result.train_loss for result in fit(state, plan)]

    (recorded, ours), (plain, theirs) = run(2), run(10**9)
    assert ours == pytest.approx(theirs, rel=1e-3)
    torch.testing.assert_close(recorded.network.state_dict(), plain.network.state_dict(), rtol=5e-3, atol=1e-4)
    assert recorded.ema is not None
    torch.testing.assert_close(recorded.ema, plain.ema, rtol=5e-3, atol=1e-4)


def test_a_network_that_has_been_elsewhere_and_back_is_recorded_anew(cuda: torch.device) -> None:
    def run(*, moves: bool) -> dict[str, Tensor]:
        state = state_on(cuda)
        for _epoch in fit(state, builders.plan(epochs=6)):
            if moves:
                state.network.to("cpu")
                held = [torch.empty(1000, device=cuda) for _ in range(20)]  # takes the memory that it had
                state.network.to(cuda)
                del held
        return {name: tensor.cpu() for name, tensor in state.network.state_dict().items()}

    torch.testing.assert_close(run(moves=True), run(moves=False), rtol=1e-3, atol=1e-4)


def test_a_step_never_waits_for_the_device(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel by kernel: a recorded step does no more. The batch has been made."""
    plain = loop._step
    waits: list[str] = []

    def strict(*arguments: object) -> None:
        with told_syncs():
            try:
                plain(*arguments)  # type: ignore[arg-type]
            except RuntimeError as error:
                waits.append(str(error))
                raise

    state = state_on(cuda, ema=0.9)
    plan = builders.plan(epochs=3, mixup=0.2, cutmix=1.0, class_weights=(1.0, 2.0, 1.5))
    list(fit(state, plan, Hooks()))  # constants have been copied, kernels loaded
    monkeypatch.setattr(loop, "_step", strict)
    monkeypatch.setattr(graphs, "RECORD_AFTER", 10**9)
    list(fit(state_on(cuda, ema=0.9), plan, Hooks()))
    assert waits == []


def test_training_is_a_few_steps_ahead_of_the_device_and_no_more(cuda: torch.device) -> None:
    """Else what is to give way to predictions would have seconds of work queued before them."""
    matrix = torch.randn(4096, 4096, device=cuda)
    lead, ends = Lead(cuda), []
    for step in range(12):
        for _ in range(20):
            matrix = (matrix @ matrix).clamp_(-1, 1)
        ends.append(torch.cuda.Event())
        ends[-1].record()
        lead.after_step()
        assert sum(not end.query() for end in ends) <= 2, step


@contextmanager
def told_syncs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every kind of waiting is told
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_the_devices_memory_the_step_is_taken_in_parts(cuda: torch.device) -> None:
    """The real allocator, kept from taking more than a little beyond what there is."""
    _free, total = torch.cuda.mem_get_info()
    network = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).to(cuda)
    built = build_optimizer([(network, 0.01)], optimizer="sgd", momentum=0.9, weight_decay=0.0, device_type="cuda")
    state = LoopState.begin(network, built, precision="fp32", ema=0.0)
    # A batch of 64 of 96 pixels needs some 600 MB for its first layer alone, and as much for its gradient.
    plan = builders.plan(
        train=builders.split(64),
        batch_size=64,
        epochs=2,
        normalise=lambda images: nn.functional.interpolate(builders.prepared(images), size=(96, 96)),
    )
    told: list[str] = []
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 900 * 2**20) / total)
    try:
        results = list(fit(state, plan, Hooks(log=lambda message, _details: told.append(message))))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(results) == 2
    assert state.micro_batches > 1
    assert told[0].startswith("Out of memory")


@pytest.mark.parametrize("augmentation", ["none", "strong"])
def test_data_that_stays_on_the_device_gives_the_same_weights(
    cuda: torch.device, augmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[LoopState, int]:
        state = state_on(cuda, ema=0.9)
        list(fit(state, builders.plan(epochs=3, augmentation=augmentation)))
        return state, kept[-1].free

    within_reason, kept = Kept.within_reason, list[Kept]()

    def told(device: torch.device, *, share: float = 1.0) -> Kept:
        made = within_reason(device)
        kept.append(Kept(made.device, round(share * made.free)))
        return kept[-1]

    monkeypatch.setattr(loop.Kept, "within_reason", told)
    ours, left = run()
    assert 0 < left < within_reason(cuda).free  # something was kept
    monkeypatch.setattr(loop.Kept, "within_reason", lambda device: told(device, share=0))
    theirs, left = run()
    assert left == 0
    torch.testing.assert_close(ours.network.state_dict(), theirs.network.state_dict(), rtol=1e-5, atol=1e-6)


def test_batches_made_beside_the_steps_are_whole_when_a_step_takes_them(cuda: torch.device) -> None:
    """The stream that makes them is far behind when they are handed over, and ahead when their memory is free again."""
    plan = builders.plan(augmentation="strong")
    matrix = torch.randn(4096, 4096, device=cuda)

    class Slow:
        """The same source, with a tenth of a second of work before each batch."""

        labels, is_light = plan.train.labels, False

        def __len__(self) -> int:
            return len(plan.train)

        def training_batch(self, positions: NDArray[np.int64], **options: Any) -> Batch:
            for _ in range(20):
                (matrix @ matrix).clamp_(-1, 1)
            return plan.train.training_batch(positions, **options)

    def batches(source: Any) -> Iterator[Batch]:
        return training_batches(source, batch_size=5, seed=0, epoch=0, first_step=0, device=cuda)

    expected = [batch.inputs.cpu() for batch in batches(plan.train)]
    sums, wanted = [], [float(inputs.double().sum()) for inputs in expected]
    for _ in range(3):
        for batch in prefetched(batches(Slow()), device=cuda):
            for _ in range(5):
                (matrix @ matrix).clamp_(-1, 1)  # so that the step is behind, too
            sums.append(batch.inputs.double().sum())
            del batch
    assert [float(found) for found in sums] == wanted * 3
