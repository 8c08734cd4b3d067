"""A server whose answers a test writes down, and what a run of the command gives back."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sent:
    """A request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class ScriptedServer:
    """Answers (method, path without query) with a status and a body; remembers what was asked."""

    url: str
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    requests: list[Sent] = field(default_factory=list)

    def sent(self, method: str, path: str) -> list[Sent]:
        return [sent for sent in self.requests if (sent.method, sent.path.partition("?")[0]) == (method, path)]


@dataclass(frozen=True)
class Result:
    exit_code: int
    output: str
    errors: str
