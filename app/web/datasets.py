"""/datasets: what was uploaded, what was found in it, and from there to a job."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app import predictions
from app.api import dataset_versions, datasets, jobs
from app.api.deps import After, ServicesDep
from app.api.schemas import Dataset, DatasetWarning, thumbnail_path
from app.api.services import Services
from app.datasets import catalog
from app.errors import NotFound
from app.web.site import PageId, go_to, page

PAGE_SIZE = 50
PICTURES_SHOWN = 60
SAMPLES_PER_CLASS = 6
# Classes whose pictures are shown at once, and those that the table has: a page of thousands is of use to nobody.
CLASSES_SHOWN = 40
CLASSES_LISTED = 200
# Warnings that point at pictures which had better be left out.
OF_PICTURES = ("duplicate_across_splits", "conflicting_labels", "suspicious_labels")

router = APIRouter(prefix="/datasets", include_in_schema=False)


@dataclass(frozen=True)
class Shown:
    """A picture beside others. thumbnail: None where the data set's files have it no more."""

    path: str
    class_name: str | None
    split: str | None
    thumbnail: str | None


@dataclass(frozen=True)
class Case:
    """What a person is to decide on: pictures side by side, each of which may be left out.

    suggested, example: for a suspicious label the class that it looks like, and a picture of that.
    """

    pictures: Sequence[Shown]
    suggested: str | None = None
    example: Shown | None = None


@router.get("")
def list_page(request: Request, services: ServicesDep, after: After = None) -> Response:
    found = datasets.list_datasets(services, limit=PAGE_SIZE, after=after)
    return page(request, "datasets.html", listing=found)


@router.get("/{dataset_id}")
def dataset_page(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    dataset = datasets.read_dataset(services, dataset_id)
    made = jobs.list_jobs(services, limit=10, dataset=dataset_id).data
    with services.database.read() as session:
        corrected = len(predictions.with_feedback(session, [dataset_id]))
    return page(
        request,
        "dataset.html",
        dataset=dataset,
        jobs=made,
        corrected=corrected,
        most_classes=CLASSES_LISTED,
        largest_class=max((each.train + each.val + each.test for each in dataset.classes), default=0),
        has_cases=any(each.code in OF_PICTURES for each in dataset.warnings),
    )


@router.get("/{dataset_id}/progress")
def progress_fragment(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    """While pictures are checked; then the page itself, anew."""
    dataset = datasets.read_dataset(services, dataset_id)
    if dataset.status != "processing":
        return go_to(request, f"/datasets/{dataset_id}")
    return page(request, "dataset_progress.html", dataset=dataset)


@router.get("/{dataset_id}/samples")
def samples_fragment(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    dataset = datasets.read_dataset(services, dataset_id)
    samples = services.pictures.samples(dataset_id, per_class=SAMPLES_PER_CLASS)
    shown = {
        name: [thumbnail_path(dataset_id, record.image_id) for record in records]
        for name, records in list(samples.items())[:CLASSES_SHOWN]
    }
    return page(request, "dataset_samples.html", dataset=dataset, samples=shown, left_out=len(samples) - len(shown))


@router.get("/{dataset_id}/cases")
def cases_fragment(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    """Copies and suspicious labels, side by side."""
    dataset = datasets.read_dataset(services, dataset_id)
    found = [
        (warning, _cases(services, dataset, warning)) for warning in dataset.warnings if warning.code in OF_PICTURES
    ]
    return page(request, "dataset_cases.html", dataset=dataset, found=found)


@router.get("/{dataset_id}/images")
def images_page(
    request: Request,
    services: ServicesDep,
    dataset_id: PageId,
    class_name: Annotated[str | None, Query(alias="class", max_length=1000)] = None,
    split: datasets.OfSplit = "",
    after: After = None,
) -> Response:
    dataset = datasets.read_dataset(services, dataset_id)
    found = datasets.list_images(
        services, dataset_id, class_name=class_name, split=split, limit=PICTURES_SHOWN, after=after
    )
    template = "dataset_pictures.html" if after else "dataset_images.html"
    return page(request, template, dataset=dataset, listing=found, class_name=class_name or "", split=split)


@router.post("/{dataset_id}/versions")
async def make_version(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    made = await dataset_versions.make_version(services, dataset_id)
    return go_to(request, f"/datasets/{made.headers['location'].rpartition('/')[2]}")


@router.post("/{dataset_id}/delete")
def delete(request: Request, services: ServicesDep, dataset_id: PageId) -> Response:
    datasets.delete_dataset(services, dataset_id)
    return go_to(request, "/datasets")


def dataset_if_there(services: Services, dataset_id: str) -> Dataset | None:
    """None where it was deleted: jobs and models outlive their data set."""
    try:
        return datasets.read_dataset(services, dataset_id)
    except NotFound:
        return None


def dataset_names(services: Services, ids: Iterable[str]) -> dict[str, str]:
    """Id → name of those that are still there."""
    with services.database.read() as session:
        return catalog.names(session, set(ids))


def _cases(services: Services, dataset: Dataset, warning: DatasetWarning) -> list[Case]:
    known = services.pictures.at_paths(dataset.id, warning.paths)

    def shown(path: str) -> Shown:
        if path not in known:
            return Shown(path, None, None, None)
        record, name = known[path]
        return Shown(path, name, record.split, thumbnail_path(dataset.id, record.image_id))

    if warning.suggested:
        examples = services.pictures.samples(dataset.id, per_class=SAMPLES_PER_CLASS)
        return [
            Case([shown(path)], suggested=name, example=_example(dataset, name, examples[name], warning.paths))
            for path, name in warning.suggested.items()
        ]
    # Those of earlier versions do not say what belongs together.
    groups = warning.groups or [[path] for path in warning.paths]
    return [Case([shown(path) for path in group]) for group in groups]


def _example(dataset: Dataset, name: str, records: Sequence[Any], suspects: Sequence[str]) -> Shown | None:
    """A picture of the class that is no suspect itself."""
    found = next((record for record in records if record.path not in suspects), None)
    return found and Shown(found.path, name, found.split, thumbnail_path(dataset.id, found.image_id))
