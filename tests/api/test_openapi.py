"""The document says all that the server does."""

import json
import re
from typing import Any

import pytest

from app.api.openapi import COMMON_STATUSES
from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    app = create_app(Settings(_env_file=None))
    # As a client gets it: through JSON.
    written: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return written


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_it_has_every_operation_of_this_version(document: dict[str, Any]) -> None:
    assert set(operations(document)) == {
        "POST /v1/datasets",
        "PUT /v1/datasets",
        "GET /v1/datasets",
        "GET /v1/datasets/{dataset_id}",
        "DELETE /v1/datasets/{dataset_id}",
        "GET /v1/datasets/{dataset_id}/images",
        "GET /v1/datasets/{dataset_id}/images/{image_id}/thumbnail",
        "OPTIONS /v1/uploads",
        "POST /v1/uploads",
        "GET /v1/uploads/{upload_id}",
        "PATCH /v1/uploads/{upload_id}",
        "DELETE /v1/uploads/{upload_id}",
        "POST /v1/jobs",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "DELETE /v1/jobs/{job_id}",
        "POST /v1/jobs/{job_id}/cancel",
        "POST /v1/jobs/{job_id}/stop",
        "GET /v1/jobs/{job_id}/history",
        "GET /v1/jobs/{job_id}/events",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "DELETE /v1/models/{model}",
        "GET /v1/models/{model}/card",
        "GET /v1/models/{model}/evaluation",
        "GET /v1/models/{model}/export",
        "GET /v1/aliases",
        "PUT /v1/aliases/{name}",
        "DELETE /v1/aliases/{name}",
        "POST /v1/aliases/{name}/rollback",
        "POST /v1/models/{model}/classes",
        "POST /v1/models/{model}/personalise",
        "GET /v1/backbones",
        "POST /v1/datasets/{dataset_id}/versions",
        "GET /v1/predictions",
        "GET /v1/predictions/{prediction_id}",
        "GET /v1/predictions/{prediction_id}/picture",
        "DELETE /v1/predictions/{prediction_id}",
        "POST /v1/predictions/{prediction_id}/feedback",
        "GET /v1/models/{model}/feedback",
        "POST /v1/batches",
        "PUT /v1/batches",
        "GET /v1/batches",
        "GET /v1/batches/{batch_id}",
        "DELETE /v1/batches/{batch_id}",
        "POST /v1/batches/{batch_id}/cancel",
        "GET /v1/batches/{batch_id}/results",
        "POST /predict",
        "GET /v2",
        "GET /v2/health/live",
        "GET /v2/health/ready",
        "GET /v2/models/{name}",
        "GET /v2/models/{name}/ready",
        "POST /v2/models/{name}/infer",
        "GET /v2/models/{name}/versions/{version}",
        "GET /v2/models/{name}/versions/{version}/ready",
        "POST /v2/models/{name}/versions/{version}/infer",
        "POST /v2/repository/index",
        "POST /v2/repository/models/{name}/load",
        "POST /v2/repository/models/{name}/unload",
        "POST /hf/{model}",
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "POST /v1/fine_tuning/jobs",
        "GET /v1/fine_tuning/jobs",
        "GET /v1/fine_tuning/jobs/{job_id}",
        "POST /v1/fine_tuning/jobs/{job_id}/cancel",
        "POST /v1/fine_tuning/jobs/{job_id}/pause",
        "POST /v1/fine_tuning/jobs/{job_id}/resume",
        "GET /v1/fine_tuning/jobs/{job_id}/events",
        "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
        "POST /v1/webhooks",
        "GET /v1/webhooks",
        "GET /v1/webhooks/{webhook_id}",
        "PATCH /v1/webhooks/{webhook_id}",
        "DELETE /v1/webhooks/{webhook_id}",
        "POST /v1/webhooks/{webhook_id}/test",
        "GET /v1/webhooks/{webhook_id}/deliveries",
        "GET /healthz",
        "GET /readyz",
        "GET /metrics",
        "GET /v1/usage",
        "GET /v1/audit",
    }


def test_every_operation_names_its_problems_and_whether_it_needs_a_key(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        for status in COMMON_STATUSES:
            assert operation["responses"][str(status)] == {"$ref": f"#/components/responses/Problem{status}"}, name
            [media_type] = document["components"]["responses"][f"Problem{status}"]["content"]
            assert media_type == "application/problem+json"
        is_open = name in ("GET /healthz", "GET /readyz")
        assert operation["security"] == ([] if is_open else [{"key": []}, {}]), name


def test_every_operation_with_a_body_says_which(document: dict[str, Any]) -> None:
    with_body = {
        name: sorted(operation["requestBody"]["content"])
        for name, operation in operations(document).items()
        if "requestBody" in operation
    }

    archive = ["application/gzip", "application/octet-stream", "application/x-tar", "application/zip"]
    assert with_body == {
        "POST /v1/datasets": [*archive, "multipart/form-data"],
        "PUT /v1/datasets": [*archive, "multipart/form-data"],
        "POST /v1/batches": [*archive, "multipart/form-data"],
        "PUT /v1/batches": [*archive, "multipart/form-data"],
        "POST /v1/uploads": ["application/offset+octet-stream"],
        "PATCH /v1/uploads/{upload_id}": ["application/offset+octet-stream"],
        "POST /v1/jobs": ["application/json"],
        "PUT /v1/aliases/{name}": ["application/json"],
        "POST /v1/predictions/{prediction_id}/feedback": ["application/json"],
        "POST /v1/models/{model}/classes": ["application/json", "multipart/form-data"],
        "POST /v1/models/{model}/personalise": ["application/json", "multipart/form-data"],
        "POST /predict": ["application/json", "image/jpeg", "image/png", "image/webp", "multipart/form-data"],
        "POST /v2/models/{name}/infer": ["application/json", "application/octet-stream"],
        "POST /v2/models/{name}/versions/{version}/infer": ["application/json", "application/octet-stream"],
        "POST /v2/repository/index": ["application/json"],
        "POST /v2/repository/models/{name}/load": ["application/json"],
        "POST /v2/repository/models/{name}/unload": ["application/json"],
        "POST /hf/{model}": ["application/json", "image/jpeg", "image/png", "image/webp"],
        "POST /v1/webhooks": ["application/json"],
        "PATCH /v1/webhooks/{webhook_id}": ["application/json"],
        "POST /v1/files": ["multipart/form-data"],
        "POST /v1/fine_tuning/jobs": ["application/json"],
    }


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))

    assert references - set(document["components"]["schemas"]) == set()


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]

    assert len(set(ids)) == len(ids)


def test_what_is_made_leads_to_what_may_be_done_with_it(document: dict[str, Any]) -> None:
    links = operations(document)["POST /v1/jobs"]["responses"]["201"]["links"]
    linked = {link["operationId"] for link in links.values()}

    assert {
        operations(document)[name]["operationId"] for name in ("GET /v1/jobs/{job_id}", "POST /v1/jobs/{job_id}/stop")
    } <= linked
    assert all(link["parameters"] == {"path.job_id": "$response.body#/id"} for link in links.values())


def test_a_header_without_which_nothing_goes_is_said_to_be_needed_and_nothing_outside_a_body_to_be_null(
    document: dict[str, Any],
) -> None:
    parameters = {
        (name, parameter["name"]): parameter
        for name, operation in operations(document).items()
        for parameter in operation.get("parameters", ())
    }

    needed = {
        name
        for (operation, name), parameter in parameters.items()
        if operation == "PATCH /v1/uploads/{upload_id}" and parameter["required"]
    }
    assert needed == {"upload_id", "tus-resumable", "upload-offset"}
    assert '"type": "null"' not in json.dumps([parameter["schema"] for parameter in parameters.values()])
    assert "x-graft" not in json.dumps(document)
