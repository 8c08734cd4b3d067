"""From a head's numbers to class probabilities."""

import torch

from app.vision.outputs import Output, probabilities

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def test_probabilities_sum_to_one_and_a_temperature_softens_them() -> None:
    sharp, soft = (probabilities(LOGITS, [Output("", ["a", "b", "c"], temperature)]) for temperature in (0.1, 10.0))
    none = probabilities(LOGITS[:0], [Output("", ["a", "b", "c"], 1.0)])

    torch.testing.assert_close(sharp.sum(1), torch.ones(4))
    assert (sharp.amax(1) > soft.amax(1)).all()
    assert none.shape == (0, 3)


def test_each_task_has_a_softmax_and_a_temperature_of_its_own() -> None:
    outputs = [Output("colour", ["red", "blue"], 0.5), Output("light", ["dark"], 2.0)]
    found = probabilities(LOGITS, outputs)

    torch.testing.assert_close(found[:, :2], (LOGITS[:, :2] / 0.5).softmax(1))
    assert found[:, 2].tolist() == [1, 1, 1, 1]
