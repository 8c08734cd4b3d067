"""Claims: an upload of 2 GB raises the API's memory by less than 64 MiB, in both upload forms; 32 of 100 MB at once
all succeed and raise it by less than 150 MiB, and the API answers meanwhile.

Starts a real API in a temporary folder, uploads a generated archive with curl and compares the process's peak
resident memory (VmHWM, reset before each upload) with its memory before. Exits with 1 if a claim does not hold.

    .venv/bin/python benchmarks/upload_memory.py [--gigabytes 2] [--at-once 32] [--megabytes 100]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import httpx

MEBIBYTE = 1024**2
MEMBER_BYTES = 32 * MEBIBYTE
LIMIT_BYTES, LIMIT_AT_ONCE_BYTES = 64 * MEBIBYTE, 150 * MEBIBYTE


def build_archive(path: Path, *, total_bytes: int) -> None:
    """A stored zip of two classes; members begin as JPEGs do and are random after, so nothing compresses."""
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(max(4, total_bytes // MEMBER_BYTES)):
            content = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + os.urandom(MEMBER_BYTES - 11)
            archive.writestr(f"{'ab'[index % 2]}/{index:05}.jpg", content)


def memory_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def wait_until_alive(url: str, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the API did not start")


def upload_at_once(url: str, archive: Path, count: int) -> tuple[list[int], float, float]:
    """Statuses, seconds until the last answer, and the longest that /healthz took meanwhile."""
    command = ["curl", "-sS", "-o", os.devnull, "-w", "%{http_code}", "-T", str(archive), f"{url}/v1/datasets"]
    started, slowest = time.monotonic(), 0.0
    uploads = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    with httpx.Client(timeout=60) as client:
        while any(upload.poll() is None for upload in uploads):
            asked = time.monotonic()
            client.get(f"{url}/healthz").raise_for_status()
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.1)
    seconds = time.monotonic() - started
    return [int(upload.communicate()[0]) for upload in uploads], seconds, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--port", type=int, default=18231)
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    holds = True
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "big.zip"
        build_archive(archive, total_bytes=int(arguments.gigabytes * 1e9))
        small = Path(folder) / "small.zip"
        build_archive(small, total_bytes=int(arguments.megabytes * 1e6))
        environment = os.environ | {
            "GRAFT_DATA_DIR": f"{folder}/data",
            "GRAFT_PORT": str(arguments.port),
            "GRAFT_LOG_LEVEL": "warning",
        }
        graft = Path(sys.executable).parent / "graft"
        subprocess.run([graft, "migrate"], env=environment, check=True)
        api = subprocess.Popen([sys.executable, "-m", "app.main"], env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_until_alive(url)
            print(f"{platform.processor() or platform.machine()}, archive of {archive.stat().st_size / 1e9:.2f} GB")
            forms = {"multipart": ["-F", f"file=@{archive}"], "raw body": ["-T", str(archive)]}
            for form, flags in forms.items():
                Path(f"/proc/{api.pid}/clear_refs").write_text("5")  # resets VmHWM
                before = memory_bytes(api.pid, "VmRSS")
                started = time.monotonic()
                answer = subprocess.run(
                    ["curl", "-sS", *flags, f"{url}/v1/datasets"], check=True, capture_output=True, text=True
                )
                seconds = time.monotonic() - started
                status = json.loads(answer.stdout).get("status")
                growth = memory_bytes(api.pid, "VmHWM") - before
                holds &= status == "processing" and growth < LIMIT_BYTES
                print(
                    f"{form}: {status}, {seconds:.1f} s, "
                    f"peak {growth / MEBIBYTE:+.1f} MiB over {before / MEBIBYTE:.0f} MiB"
                )
            Path(f"/proc/{api.pid}/clear_refs").write_text("5")
            before = memory_bytes(api.pid, "VmRSS")
            statuses, seconds, slowest = upload_at_once(url, small, arguments.at_once)
            growth = memory_bytes(api.pid, "VmHWM") - before
            holds &= set(statuses) == {201} and growth < LIMIT_AT_ONCE_BYTES
            print(
                f"{arguments.at_once} of {small.stat().st_size / 1e6:.0f} MB at once: {statuses.count(201)} made, "
                f"{seconds:.1f} s, peak {growth / MEBIBYTE:+.1f} MiB over {before / MEBIBYTE:.0f} MiB, "
                f"/healthz within {slowest * 1000:.0f} ms"
            )
        finally:
            api.terminate()
            api.wait(30)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
