"""Each value in a valid JSON body of every route, replaced by hostile ones, and with members that nobody asked for.

None is a fault of the server's, and what is taken is what the OpenAPI document allows there.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import api_builders
import builders
import httpx
import jsonschema_rs
import pytest
from api_builders import CLASSES, RunningServer
from test_classes import support_of
from test_feedback import ready_dataset
from test_predict_trust import reference
from test_schemathesis import nowhere

from app.api.fine_tuning_bodies import MethodName

PICTURE = base64.b64encode(builders.jpeg(1)).decode()
TENSOR = [0.0] * (3 * 32 * 32)

# Of one route several bodies, where members exclude each other. In braces: ids of what is there, below.
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "post",
        "/v1/jobs",
        {
            "dataset": "{dataset}",
            "method": "fine_tuning",
            "backbone": "graft_small",
            "seed": 7,
            "name": "first",
            "recipe": "classic",
            "promote": "never",
            "budget_seconds": 60.5,
            "exclude": ["cat/1.jpg"],
            "metadata": {"who": "me"},
            "hyperparameters": {
                "epochs": 3,
                "batch_size": 8,
                "optimizer": "sgd",
                "learning_rate": 0.1,
                "backbone_learning_rate": 0.01,
                "momentum": 0.9,
                "weight_decay": 0.001,
                "scheduler": "step",
                "step_size": 2,
                "gamma": 0.5,
                "warmup_epochs": 0.5,
                "label_smoothing": 0.1,
                "unfreeze": 1,
                "image_size": 64,
                "augmentation": "classic",
                "mixup": 0.2,
                "cutmix": 0.2,
                "ema": True,
                "class_weights": "balanced",
                "early_stopping_patience": 3,
            },
        },
    ),
    (
        "post",
        "/v1/jobs",
        {
            "dataset": "{dataset}",
            "method": "feature_extraction",
            "backbone": "graft_small",
            "hyperparameters": {"feature_layer": "all", "augmented_views": 2, "ema": 0.99},
        },
    ),
    ("put", "/v1/aliases/{alias}", {"model": "{model}"}),
    ("post", "/v1/models/{shots}/classes", {"images": [{"b64": PICTURE, "filename": "a.jpg"}], "name": "wasp"}),
    (
        "post",
        "/v1/models/{model}/personalise",
        {
            "images": [
                {"b64": PICTURE, "filename": "a.jpg", "label": CLASSES[0]},
                {"b64": PICTURE, "label": {"": CLASSES[1]}},
            ]
        },
    ),
    (
        "post",
        "/predict",
        {
            "images": [{"b64": PICTURE, "filename": "a.jpg"}],
            "model": "{model}",
            "top_k": 2,
            "store": False,
            "explain": True,
            "adapt": "entropy",
            "adapt_parameters": "normalisation",
            "adapt_steps": 1,
            "adapt_learning_rate": 0.001,
        },
    ),
    ("post", "/predict", {"images": [{"b64": PICTURE}], "model": "{trusted}", "coverage": 0.9, "neighbors": 2}),
    ("post", "/v1/predictions/{prediction}/feedback", {"label": CLASSES[0], "task": "", "new_class": True}),
    (
        "post",
        "/v2/models/{model}/infer",
        {
            "id": "mine",
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [1, 1],
                    "parameters": {"binary_data_size": None, "shared_memory_region": None},
                    "data": [PICTURE],
                }
            ],
            "outputs": [{"name": "scores", "parameters": {"classification": 1, "binary_data": False}}],
            "parameters": {"classification": 1, "binary_data_output": False},
        },
    ),
    (
        "post",
        "/v2/models/{model}/versions/1/infer",
        {"inputs": [{"name": "preprocessed", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": TENSOR}]},
    ),
    ("post", "/v2/repository/index", {"ready": True}),
    ("post", "/v2/repository/models/{shots}/load", {"parameters": {}}),
    ("post", "/v2/repository/models/{shots}/unload", {"parameters": {"unload_dependents": False}}),
    (
        "post",
        "/hf/{model}",
        {
            "inputs": PICTURE,
            "parameters": {"top_k": 2, "function_to_apply": "sigmoid"},
            "options": {"use_cache": True},
        },
    ),
    (
        "post",
        "/v1/fine_tuning/jobs",
        {
            "model": "graft_small",
            "training_file": "{file}",
            "validation_file": "{file}",
            "seed": 7,
            "suffix": "mine",
            "metadata": {"who": "me"},
            "integrations": [],
            "recipe": "modern",
            "promote": "never",
            "budget_seconds": 60.5,
            "exclude": ["cat/1.jpg"],
            "hyperparameters": {"n_epochs": 3, "batch_size": 8},
        },
    ),
    *(
        (
            "post",
            "/v1/fine_tuning/jobs",
            {
                "model": "graft_small",
                "training_file": "{file}",
                "method": {"type": method, method: {"hyperparameters": {name: value}}},
            },
        )
        for method, name, value in (
            *((method, "image_size", 64) for method in get_args(MethodName)),
            ("full_fine_tuning", "learning_rate_multiplier", 1.5),
        )
    ),
    ("post", "/v1/webhooks", {"url": "https://hooks.example/", "events": ["job.succeeded"], "enabled": True}),
    ("patch", "/v1/webhooks/{webhook}", {"url": "https://hooks.example/", "events": ["job.failed"], "enabled": True}),
]

# As they travel. What is no JSON, or cannot be stored, is refused wherever it stands.
NEVER_TAKEN = ["NaN", "Infinity", "-Infinity", '"\\u0000"', '"\\ud800"', '"a\\udfffb"', "1e999"]
HOSTILE = [
    *("-1", "0", "1e308", str(10**30), str(2**63), "1" + 400 * "0", '""', "null", "true", "[]", "{}", '"../../x"'),
    f'"{2**20 * "A"}"',
]
UNASKED = {"state": "succeeded", "owner": "me", "fence": 7, "model_id": "mdl_1", "workspace_id": "ws_1", "__class__": 1}

Place = tuple[str | int, ...]  # in a body: the names and numbers that lead there

# Objects whose members have names of the caller's own.
FREE = {
    ("/v1/jobs", ("metadata",)),
    ("/v1/fine_tuning/jobs", ("metadata",)),
    ("/hf/{model}", ("options",)),
}
# Members that are not known are other extensions': "the server may ignore them", the protocol says, and clients send
# some. That they change nothing is tested.
PASSES_OVER = "/v2/"


@dataclass(frozen=True)
class Mutant:
    """text: the body. where: what is mutated in it. is_unasked: by a member more."""

    where: Place
    token: str
    text: str
    is_unasked: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.token[:40]}"


def nodes(value: Any, where: Place = ()) -> Iterator[tuple[Place, Any]]:
    """It and all values in it. Of a list the first element stands for all."""
    yield where, value
    members: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = list(enumerate(value))[:1]
    for name, member in members:
        yield from nodes(member, (*where, name))


def replaced(body: Any, where: Place, value: Any) -> Any:
    if not where:
        return value
    copy = body.copy()
    copy[where[0]] = replaced(body[where[0]], where[1:], value)
    return copy


def mutants(body: dict[str, Any]) -> Iterator[Mutant]:
    mark = "@@here@@"
    for where, value in nodes(body):
        if where:
            text = json.dumps(replaced(body, where, mark))
            for token in (*NEVER_TAKEN, *HOSTILE):
                yield Mutant(where, token, text.replace(f'"{mark}"', token))
        if isinstance(value, dict):
            for name, unasked in UNASKED.items():
                more = json.dumps(replaced(body, where, {**value, name: unasked}))
                yield Mutant(where, f"{name}, unasked", more, is_unasked=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here."""
    settings = api_builders.settings_for(tmp_path_factory.mktemp("server"), webhooks=True)
    with api_builders.running(settings, resolve=nowhere) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def there(server: RunningServer, client: httpx.Client) -> dict[str, str]:
    """Ids of what the bodies and paths name."""
    dataset = ready_dataset(server, client, builders.class_folders(12, classes=CLASSES))["id"]
    model = api_builders.register_model(server.services, dataset_id=dataset)
    kept = client.post("/predict?store=true", content=builders.jpeg(1)).json()["predictions"][0]["id"]
    return {
        "dataset": dataset,
        "file": dataset.replace("ds_", "file-"),
        "model": model,
        "alias": "mine",
        "shots": api_builders.register_model(server.services, aliases=(), support=support_of(9)),
        "trusted": api_builders.register_model(server.services, aliases=(), reference=reference()),
        "prediction": kept,
        "webhook": client.post("/v1/webhooks", json={"url": "https://hooks.example/"}).json()["id"],
    }


def filled(body: Any, there: Mapping[str, str]) -> Any:
    """With ids for what stands in braces."""
    text = json.dumps(body)
    for name, id in there.items():
        text = text.replace(f"{{{name}}}", id)
    return json.loads(text)


def json_routes(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The schema of each operation's JSON body, by method and path."""
    return {
        (method, path): {**operation["requestBody"]["content"]["application/json"]["schema"], **shared(document)}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }


def shared(document: dict[str, Any]) -> dict[str, Any]:
    return {"components": {"schemas": document["components"]["schemas"]}}


def route_of(document: dict[str, Any], method: str, path: str) -> tuple[str, str]:
    """The operation that answers at a path of the table above."""

    def matches(template: str) -> bool:
        return re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) is not None

    [found] = [key for key in json_routes(document) if key[0] == method and matches(key[1])]
    return found


def members_of(schema: Mapping[str, Any], document: Mapping[str, Any], where: Place = ()) -> Iterator[Place]:
    """Where the members are that a schema names, as `nodes` has it."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for kind in schema.get("anyOf", ()):
        yield from members_of(kind, document, where)
    for name, member in schema.get("properties", {}).items():
        yield (*where, name)
        yield from members_of(member, document, (*where, name))
    if "items" in schema:
        yield from members_of(schema["items"], document, (*where, 0))


def test_every_member_of_every_json_body_is_mutated(server: RunningServer) -> None:
    document = server.app.openapi()
    mutated: dict[tuple[str, str], set[Place]] = {key: set() for key in json_routes(document)}
    for method, path, body in BODIES:
        mutated[route_of(document, method, path)] |= {where for where, _ in nodes(body)}
    # One function answers both; by version it is sent numbers here.
    by_name, by_version = (("post", f"/v2/models/{{name}}{rest}/infer") for rest in ("", "/versions/{version}"))
    mutated[by_version] |= mutated[by_name]

    forgotten = {key: set(members_of(schema, document)) - mutated[key] for key, schema in json_routes(document).items()}
    assert {key: places for key, places in forgotten.items() if places} == {}
    assert all(mutated.values())


@pytest.mark.parametrize(
    ("method", "path", "body"), BODIES, ids=[f"{method}-{path}-{i}" for i, (method, path, _) in enumerate(BODIES)]
)
def test_hostile_values_and_unasked_members_are_refused_or_allowed_by_the_document(
    server: RunningServer, client: httpx.Client, there: dict[str, str], method: str, path: str, body: dict[str, Any]
) -> None:
    document = server.app.openapi()
    route = route_of(document, method, path)
    allowed = jsonschema_rs.validator_for(json_routes(document)[route])
    url, body = filled(path, there), filled(body, there)

    def ask(text: str) -> httpx.Response:
        answer = client.request(method, url, content=text, headers={"Content-Type": "application/json"})
        if route == ("post", "/v1/webhooks") and answer.status_code == 201:
            client.delete(answer.headers["location"])  # there may not be very many
        return answer

    untouched = ask(json.dumps(body))
    assert untouched.is_success, untouched.text
    found = []
    for mutant in mutants(body):
        answer = ask(mutant.text)
        if not (answer.is_success or 400 <= answer.status_code < 500):
            found.append(f"{mutant}: {answer.status_code}")
        if answer.is_success and mutant.token in NEVER_TAKEN:
            found.append(f"{mutant}: taken")
        if answer.is_success and mutant.token not in NEVER_TAKEN and not allowed.is_valid(json.loads(mutant.text)):
            found.append(f"{mutant}: taken, against the document")
        if answer.is_success and mutant.is_unasked and (route[1], mutant.where) not in FREE:
            if not route[1].startswith(PASSES_OVER):
                found.append(f"{mutant}: taken")
            elif answer.content != untouched.content:
                found.append(f"{mutant}: answered otherwise than without it")
    assert found == []
