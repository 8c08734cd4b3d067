"""`graft demo`: what it asks for. tests/test_readme.py runs it."""

from app.cli.demo import TRAINING
from app.jobs.request import parse_request
from app.jobs.spec import ClassFacts, DatasetFacts, resolve
from app.vision.backbones import BACKBONES, GRAFT_SMALL


def test_the_demo_trains_what_comes_with_graft_though_better_weights_can_be_had() -> None:
    digits = DatasetFacts(tuple(ClassFacts(name, 100, 20) for name in ("one", "two")))
    everything = {name: backbone.weights[0].name for name, backbone in BACKBONES.items()}

    spec = resolve(
        parse_request({"dataset": "ds_1", **TRAINING}), dataset=digits, weights=everything, device_type="cpu"
    )

    assert spec.backbone.name == GRAFT_SMALL
