"""Models in memory: a head each, and networks that any number of them share. Knows artifacts; not queues, not HTTP."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import structlog
import torch
from torch import Tensor

from app.errors import Conflict, Overloaded
from app.serving import engine_builder
from app.serving.adaptation import NEIGHBOURS, Head, Plan, entropy_steps, neighbour_steps
from app.serving.engines import Engine, GraphEngine, TorchEngine
from app.settings import ServingEngine
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.backbones import weights_digest
from app.vision.classifier import Classifier
from app.vision.heatmaps import Heat, HeatMaps, log_odds
from app.vision.images import Pixels
from app.vision.outputs import probabilities
from app.vision.preprocessing import Preprocessing, normalise
from app.vision.recording import CannotRecord, may_record

log = structlog.get_logger(__name__)


class Network:
    """A backbone on its device, which any number of models may share.

    key: the same for the same weights. records: whether passes of a few pictures are worth recording, where that can
    be done. engine: says for any model what torch says; half: in half precision, for models that it was tried with and
    keeps (half_keeps, by id). tries_half: whether it is worth trying with others.
    """

    def __init__(
        self,
        key: str,
        classifier: Classifier,
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        records: bool = True,
    ) -> None:
        self.key = key
        self.backbone = classifier.backbone
        self.preprocessing = preprocessing
        self._weights_bytes: int = sum(tensor.nbytes for tensor in classifier.backbone.state_dict().values())
        self.torch = TorchEngine(classifier.backbone, preprocessing, device)
        self._heat_maps, self._device = HeatMaps(classifier.backbone, preprocessing.crop), device
        self.engine: Engine = self.torch
        self.half: Engine | None = None
        self.half_keeps: dict[str, bool] = {}
        self.tries_half = False
        # The first pass allocates and, on a GPU, picks kernels: nobody's request should wait for that.
        self.features(torch.zeros(1, 3, preprocessing.crop, preprocessing.crop, dtype=torch.uint8))
        if records and may_record(device):
            try:
                self.engine = GraphEngine(self.torch, side=preprocessing.crop, device=device)
            except (CannotRecord, torch.OutOfMemoryError) as error:
                log.warning("passes not recorded", network=key, said=str(error).splitlines()[0])

    @property
    def size_bytes(self) -> int:
        """Of weights, in each of the forms that they are held in."""
        engines = {id(engine): engine.size_bytes for engine in (self.torch, self.engine, self.half) if engine}
        return self._weights_bytes + sum(engines.values())

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 (N, 3, S, S), or float32 and normalised already. Returns float32 (N, D) on the CPU."""
        return (self.engine if pixels.dtype == torch.uint8 else self.torch).features(pixels)

    def evidence(self, pixels: Tensor, score: Callable[[Tensor], Tensor]) -> Heat:
        """Where in one picture, uint8 (3, S, S), is what raises the score of its features: (S, S), 0 to 1.

        Raises Overloaded if the device has no memory left for it.
        """
        with memory_or_overloaded():
            image = normalise(pixels.unsqueeze(0).to(self._device), self.preprocessing, torch.float32)
            return self._heat_maps.evidence(image, score)


class LoadedModel:
    """A model that is ready: a network, maybe shared, and a head of its own.

    dataset_id: what it was trained on. reference: what its answers are held against; old models have none.
    """

    def __init__(self, model_id: str, loaded: Artifact, network: Network) -> None:
        self.id = model_id
        self.network = network
        self.outputs = loaded.outputs
        self.preprocessing = loaded.preprocessing
        self.dataset_id: str | None = loaded.metadata.get("dataset")
        self.reference = loaded.reference
        head = loaded.classifier.head
        self.head = Head(head.weight.detach().T.contiguous(), head.bias.detach())
        self.size_bytes = self.head.weight.nbytes + self.head.bias.nbytes
        self.size_bytes += self.reference.size_bytes if self.reference else 0
        self.asked = self.builds = 0

    @property
    def engine(self) -> Engine:
        """The fastest that may answer for this model."""
        network = self.network
        return network.half if network.half and network.half_keeps.get(self.id) else network.engine

    def engine_for(self, pixels: Tensor) -> Engine:
        """pixels: of one picture or of many; the other engines know uint8 alone."""
        return self.engine if pixels.dtype == torch.uint8 else self.network.torch

    def probabilities(self, features: Tensor) -> Tensor:
        """features: float32 (N, D). Returns float32 (N, C), calibrated, of all outputs."""
        return probabilities(self.head.logits(features), self.outputs)

    def evidence(self, pixels: Tensor, label: int) -> Heat:
        """Where in one picture, uint8 (3, S, S), is what speaks for a label of the first task: (S, S), 0 to 1."""
        count = len(self.outputs[0].classes)

        def score(features: Tensor) -> Tensor:
            weight, bias = (part[..., :count].to(features.device) for part in self.head)
            return log_odds(features @ weight + bias, label)

        return self.network.evidence(pixels, score)

    def ood_score(self, features: Tensor) -> float | None:
        """Of one picture, by its features, float32 (D,); None without a reference."""
        reference = self.reference
        return None if reference is None else reference.ood_score(reference.similarities(features.numpy()))

    def entropy_steps(self, views: Tensor, plan: Plan) -> Generator[None, None, Tensor]:
        """Logits (C,) of a picture by a copy that was tuned to views of it, uint8 (V, 3, S, S)."""
        reference = self.reference

        def likeness(features: Tensor) -> Tensor:
            assert reference is not None
            return torch.from_numpy(reference.likeness(features.numpy()))

        known = likeness if reference else None
        backbone = self.network.backbone
        return entropy_steps(backbone, self.head, views, self.outputs, self.preprocessing, plan, likeness=known)

    def neighbour_steps(self, images: Tensor, places: Sequence[int], plan: Plan) -> Generator[None, None, Tensor]:
        """Logits (C,) of a picture by a copy whose last stage was tuned to its neighbours, of these places.

        images: uint8 (1 + K, 3, S, S), the picture first, then the neighbours as they look when they look as it does.
        """
        assert self.reference is not None, "checked by who asks for neighbours"
        as_they_are = torch.from_numpy(self.reference.raw(places))
        backbone = self.network.backbone
        return neighbour_steps(backbone, self.head, images, as_they_are, self.outputs, self.preprocessing, plan)

    def neighbours_of(self, features: Tensor, pictures: Sequence[Pixels | None]) -> tuple[list[int], list[Pixels]]:
        """Places in the reference of the training pictures most like one, and the pictures, as far as they are there.

        pictures: the reference's. Raises Conflict where none is there.
        """
        assert self.reference is not None, "checked by who asks for neighbours"
        likeness = self.reference.similarities(features.numpy())
        found = [
            (place, picture) for place in likeness.argsort()[::-1].tolist() if (picture := pictures[place]) is not None
        ][:NEIGHBOURS]
        if not found:
            raise Conflict(
                "The data set that this model was trained on was deleted, and with it the pictures that "
                "adapt=neighbors tunes to; adapt=entropy needs none.",
                code="no-training-pictures",
            )
        return [place for place, _ in found], [picture for _, picture in found]


def read_model(folder: Path) -> tuple[Artifact, str]:
    """The artifact, and a key that is the same for the same backbone and preprocessing."""
    loaded = artifact.load(folder)
    backbone = loaded.classifier.backbone
    described = (backbone.name, loaded.classifier.feature_layer, loaded.preprocessing)
    return loaded, weights_digest(described, backbone.state_dict())[:32]


def open_built_engine(storage: LocalStorage, network: Network, policy: ServingEngine) -> None:
    """Gives the network the fastest engines that were built for it, if any were and are worth it."""
    folder = storage.path(engine_builder.key_of(network.key))
    if policy == "torch" or not folder.exists():
        return
    try:
        built = engine_builder.open_built(folder, policy)
    except (OSError, ValueError) as error:
        log.warning("engine cannot be read", error=str(error)[:500])
        return
    network.engine = built.exact or network.engine
    network.half, network.half_keeps = built.half, built.report.half_keeps
    network.tries_half = policy == "auto" and built.report.half is not None
    half = network.half and network.half.name
    log.info("engine chosen", engine=network.engine.name, half=half, **asdict(built.report))


def bytes_of(models: Iterable[LoadedModel]) -> int:
    """Of weights; a network that several models share counts once."""
    heads = 0
    networks: dict[str, int] = {}
    for model in models:
        heads += model.size_bytes
        networks[model.network.key] = model.network.size_bytes
    return heads + sum(networks.values())


@contextlib.contextmanager
def memory_or_overloaded() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise Overloaded("The device is out of memory; try again soon.", retry_after_seconds=5) from None
