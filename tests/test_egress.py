"""The way out: to nothing that is not public, to the address that was looked at, and to nowhere else."""

import asyncio
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import hook_receiver
import pytest
import trustme
from hook_receiver import Receiver

from app.egress import Answer, Egress, Lookups, Network, Refused, Unreachable, is_public

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)

NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.0.1"),
    *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1"),
    *("198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
    "255.255.255.255",
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::"),
    *("2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd12::1", "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1"),
]
PUBLIC = [
    *(
        "1.1.1.1",
        "8.8.8.8",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "223.255.255.255",
    ),
    *("2606:4700:4700::1111", "2001:4860:4860::8888", "2a00::1"),
]

# Names that no server answers for, two attempts for each; meanwhile others are sent to, and other threads are free.
UNANSWERED = """
import asyncio, ipaddress, json, sys, threading, time
from app.egress import Egress, Lookups, Unreachable

async def post(egress, url):
    try:
        return (await egress.post(url, body=b"{}", headers={})).status
    except Unreachable as failure:
        return str(failure)

async def main():
    egress = Egress([ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1")], Lookups())
    began = time.monotonic()
    waiting = [asyncio.create_task(post(egress, f"http://h{n % 40}.example/")) for n in range(80)]
    await asyncio.sleep(0)
    said = {"other": await post(egress, sys.argv[1]), "threads": threading.active_count()}
    await asyncio.to_thread(int)
    said["seconds"] = time.monotonic() - began
    said["unanswered"] = sorted(set(await asyncio.gather(*waiting)))
    print(json.dumps(said))

asyncio.run(main())
"""


class Names:
    """A name server under the test's control: what it says changes with each look."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.looked_up: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.looked_up.append(host)
        return self._answers.pop(0)


def post(
    url: str, *, networks: Collection[Network] = LOOPBACK, names: Names | None = None, body: bytes = b"{}"
) -> Answer:
    egress = Egress(networks, names or Lookups())
    return asyncio.run(egress.post(url, body=body, headers={"x-own": "1"}))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_address_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_address_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_name_of_what_is_not_public_is_refused_whatever_else_it_names(address: str) -> None:
    for found in ([address], ["1.1.1.1", address]):
        with pytest.raises(Refused, match="not public"):
            post("https://hooks.example/", networks=(), names=Names(found))


@pytest.mark.parametrize(
    "url",
    [
        *("http://hooks.example/", "ftp://hooks.example/", "//hooks.example/", "hooks.example", "", "https://"),
        *("https://user@hooks.example/", "https://u:p@hooks.example/", "https://hooks.example/#x", "https://[::1"),
        *("https://127.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/"),
        *("https://169.254.169.254/latest/meta-data", "https://hooks.example/" + "x" * 2000, "https://a b/"),
    ],
)
def test_url_is_refused_before_any_name_is_looked_up(url: str) -> None:
    with pytest.raises(Refused):
        Egress((), Lookups()).check_url(url)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1", "localhost."])
def test_other_spellings_of_loopback_are_seen_through(host: str) -> None:
    with pytest.raises((Refused, Unreachable)) as raised:
        post(f"https://{host}/", networks=())

    assert str(raised.value) in ("the host's address is not public", "the host's name leads nowhere")


def test_http_goes_to_allowed_networks_alone() -> None:
    Egress(LOOPBACK, Lookups()).check_url("http://127.0.0.1:8000/x")
    with pytest.raises(Refused, match="not https"):
        Egress(LOOPBACK, Lookups()).check_url("http://8.8.8.8/")
    with pytest.raises(Refused, match="not https"):
        post("http://hooks.example/", names=Names(["8.8.8.8"]))


def test_name_is_looked_up_once_and_the_connection_goes_to_what_was_looked_at() -> None:
    allowed = (ipaddress.ip_network("127.0.0.2/32"),)
    with Receiver(host="127.0.0.2") as receiver, Receiver(host="127.0.0.1", port=receiver.port) as victim:
        names = Names(["127.0.0.2"], ["127.0.0.1"])
        url = f"http://hooks.example:{receiver.port}/a?b=c"

        assert post(url, networks=allowed, names=names) == Answer(204)
        assert names.looked_up == ["hooks.example"]
        with pytest.raises(Refused, match="not public"):
            post(url, networks=allowed, names=names)

        [(headers, body)] = receiver.requests
        assert (headers["host"], headers["x-own"], body) == (f"hooks.example:{receiver.port}", "1", b"{}")
        assert victim.requests == []


def test_name_of_other_letters_is_looked_up_as_it_is_told_to_the_receiver() -> None:
    names = Names(["127.0.0.1"])
    with Receiver() as receiver:
        post(f"http://stra\u00dfe.example:{receiver.port}/", names=names)

        [(headers, _)] = receiver.requests
        assert headers["host"] == f"{names.looked_up[0]}:{receiver.port}" == f"xn--strae-oqa.example:{receiver.port}"


def test_certificate_is_held_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.example").configure_cert(tls)
    with Receiver(tls=tls) as receiver:
        with pytest.raises(Unreachable, match="certificate"):
            post(f"https://hooks.example:{receiver.port}/", names=Names(["127.0.0.1"]))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with pytest.raises(Unreachable, match="certificate"):
            post(f"https://other.example:{receiver.port}/", names=Names(["127.0.0.1"]))
        assert receiver.requests == []

        assert post(f"https://hooks.example:{receiver.port}/", names=Names(["127.0.0.1"])) == Answer(204)

        assert receiver.requests[0][0]["host"] == f"hooks.example:{receiver.port}"


def test_redirect_is_an_answer_like_another() -> None:
    with Receiver() as victim, Receiver() as receiver:
        receiver.answers = [hook_receiver.status(code, Location=victim.url) for code in (301, 302, 303, 307, 308)]

        assert [post(receiver.url).status for _ in range(5)] == [301, 302, 303, 307, 308]

        assert victim.requests == []


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

        assert post(receiver.url) == Answer(204)

        assert (len(proxy.requests), len(receiver.requests)) == (0, 1)


def test_answer_of_megabytes_is_not_read_to_its_end() -> None:
    with Receiver() as receiver:
        receiver.answers = [hook_receiver.megabytes]

        assert post(receiver.url) == Answer(200)


def test_receiver_that_hangs_is_given_up() -> None:
    with Receiver() as receiver:
        receiver.answers = [receiver.hang]

        with pytest.raises(Unreachable, match="no answer within 5 s"):
            post(receiver.url)


def test_what_is_not_there_is_told_in_our_words() -> None:
    port = hook_receiver.unused_port()
    with pytest.raises(Unreachable, match="there is nothing at the host's address"):
        post(f"http://127.0.0.1:{port}/")
    with pytest.raises(Unreachable, match="leads nowhere"):
        post("https://hooks.example/", names=Names([]))


def test_next_address_is_tried_where_there_is_nothing_at_the_first() -> None:
    with Receiver(host="127.0.0.3") as receiver:
        url = f"http://hooks.example:{receiver.port}/"

        assert post(url, names=Names(["127.0.0.4", "127.0.0.3"])) == Answer(204)


def test_waiting_that_the_receiver_asks_for_is_told() -> None:
    with Receiver() as receiver:
        receiver.answers = [hook_receiver.status(503, Retry_After=value) for value in ("7", "soon", "9" * 30)]

        assert [post(receiver.url).retry_after_seconds for _ in range(3)] == [7, None, 999999999]


@pytest.mark.slow
def test_names_that_no_server_answers_for_hold_up_nobody_else(tmp_path: Path) -> None:
    names = tmp_path / "resolv.conf"
    names.write_text("nameserver 127.0.0.53\noptions timeout:30 attempts:1\n")
    use_names = ["unshare", "--mount", "sh", "-c", f'mount --bind {names} /etc/resolv.conf && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*use_names, "true"], check=False).returncode != 0:
        pytest.skip("needs unshare, and to mount in it")
    with socket.socket(type=socket.SOCK_DGRAM) as silent, Receiver() as receiver:
        silent.bind(("127.0.0.53", 53))
        url = f"http://localhost:{receiver.port}/"
        began = time.monotonic()

        ran = subprocess.run(
            [*use_names, sys.executable, "-c", UNANSWERED, url], check=True, capture_output=True, timeout=60
        )

        seconds = time.monotonic() - began
    said = json.loads(ran.stdout)
    assert (said["other"], said["threads"]) == (204, 1 + 40), "a host is looked up once at a time"
    assert said["unanswered"] == ["there was no answer within 5 s"]
    assert said["seconds"] < 4
    assert seconds < 25, "the process waits for no lookup"
