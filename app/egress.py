"""The only way out to an address that a caller named: one POST, to a public host that was looked up once.

A name may mean one host when it is checked and another when it is used. So it is resolved once, every address is held
against what is allowed, and the connection goes to the address that was looked at, with the name in Host and in TLS.
Nothing redirects it, no proxy takes it elsewhere, and it ends after a time and a number of bytes.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import httpx

TIMEOUT_SECONDS = 5.0
# Of an answer, which nobody looks at: read at all so that the receiver can end in good order.
MAX_ANSWER_BYTES = 64 * 1024
MAX_URL_CHARACTERS = 2000
# At a time; more than the webhooks of one workspace, whose hosts may all be such that nobody answers for.
MAX_LOOKUPS = 128

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
# Host and port → its addresses, as text. Raises OSError or Unreachable.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# Not for the public: IANA's registry of special addresses, and what is reserved or for many. A list of our own, since
# what `ipaddress` calls global differs between versions of Python.
_NOT_PUBLIC_4 = tuple(
    IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
# Of IPv6 only what is given out for the public: that leaves out loopback, local, multicast, IPv4-mapped and NAT64
# addresses. Within it, ways to other networks (Teredo, 6to4) and documentation.
_PUBLIC_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))

_HOST = re.compile(rb"\[?[0-9A-Fa-f:.]+\]?|[A-Za-z0-9._-]+")


class Refused(Exception):
    """The address may not be sent to. Its text says why, to whoever named it."""


class Unreachable(Exception):
    """No answer. Its text says why: no text of a library, and nothing of what is inside the network."""


@dataclass(frozen=True)
class Answer:
    """retry_after_seconds: as the receiver asked, where it did."""

    status: int
    retry_after_seconds: int | None = None


@dataclass(frozen=True)
class Egress:
    """Where requests may go. networks: besides public ones by https, these, also by http."""

    networks: Collection[Network]
    resolve: Resolve

    def check_url(self, text: str) -> None:
        """Refuses what can be told without looking a name up. Raises Refused."""
        url = _parsed(text)
        if url.scheme == "http" and not self.networks:
            raise Refused("it is not https")
        try:
            literal = ipaddress.ip_address(url.host)
        except ValueError:
            return
        self._check(literal, is_secure=url.scheme == "https")

    async def post(self, text: str, *, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Sends the body once. Raises Refused or Unreachable."""
        url = _parsed(text)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                addresses = await self._addresses(url)
                return await self._send(url, addresses, body=body, headers=headers)
        except TimeoutError:
            raise Unreachable(f"there was no answer within {TIMEOUT_SECONDS:g} s") from None

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        try:
            found = await self.resolve(_name(url), _port(url))
        except (OSError, UnicodeError):
            raise Unreachable("the host's name leads nowhere") from None
        addresses = [ipaddress.ip_address(address) for address in found]
        if not addresses:
            raise Unreachable("the host's name leads nowhere")
        for address in addresses:
            self._check(address, is_secure=url.scheme == "https")
        return addresses

    def _check(self, address: Address, *, is_secure: bool) -> None:
        if any(address in network for network in self.networks if network.version == address.version):
            return
        if not is_public(address):
            raise Refused("the host's address is not public")
        if not is_secure:
            raise Refused("it is not https")

    async def _send(
        self, url: httpx.URL, addresses: Sequence[Address], *, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        # The environment could name a proxy, which would look the name up again.
        async with httpx.AsyncClient(verify=ssl.create_default_context(), trust_env=False, timeout=None) as client:
            for address in addresses:
                request = client.build_request(
                    "POST",
                    url.copy_with(host=str(address)),
                    content=body,
                    headers={**headers, "Host": url.netloc.decode("ascii"), "Connection": "close"},
                    extensions={"sni_hostname": _name(url)},
                )
                try:
                    response = await client.send(request, stream=True, follow_redirects=False)
                except httpx.ConnectError as error:
                    if isinstance(error.__cause__, ssl.SSLError) or "CERTIFICATE" in str(error).upper():
                        raise Unreachable("the host has no valid certificate") from None
                    continue
                except httpx.HTTPError:
                    raise Unreachable("the connection broke, or the answer was not HTTP") from None
                return await _answer(response)
        raise Unreachable("there is nothing at the host's address")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and to nothing that leads elsewhere."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    is_given_out = address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)
    return is_given_out and address.scope_id is None


class Lookups:
    """Looks hosts up as the operating system does.

    That may take half a minute where no name server answers, and cannot be ended. So each lookup has a thread of its
    own, which nobody else waits for and which does not hold up the process's end, and a host has one at a time.
    """

    def __init__(self) -> None:
        self._running: dict[str, Future[list[Any]]] = {}

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError, and Unreachable while too many names are looked up."""
        lookup = self._running.get(host) or self._begin(host)
        # Whoever gives up waiting leaves the lookup to others.
        found = await asyncio.wrap_future(lookup)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def _begin(self, host: str) -> Future[list[Any]]:
        if len(self._running) >= MAX_LOOKUPS:
            raise Unreachable("too many other names are being looked up")
        lookup: Future[list[Any]] = Future()
        lookup.set_running_or_notify_cancel()  # from here on nothing cancels it
        threading.Thread(target=_look_up, args=(host, lookup), name="lookup", daemon=True).start()
        self._running[host] = lookup
        lookup.add_done_callback(lambda _: self._running.pop(host))
        return lookup


def _look_up(host: str, lookup: Future[list[Any]]) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except Exception as error:  # noqa: BLE001 (handed to those who wait)
        lookup.set_exception(error)


async def _answer(response: httpx.Response) -> Answer:
    try:
        read = 0
        async for chunk in response.aiter_raw(MAX_ANSWER_BYTES):  # as it came: nothing is unpacked
            read += len(chunk)
            if read >= MAX_ANSWER_BYTES:
                break
    except httpx.HTTPError:
        pass  # its status has come, and that is what counts
    finally:
        await response.aclose()
    after = response.headers.get("retry-after", "")
    return Answer(response.status_code, int(after[:9]) if after.isascii() and after.isdigit() else None)


def _parsed(text: str) -> httpx.URL:
    """Raises Refused."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise Refused("it is no URL") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused("it is no https URL")
    if not _HOST.fullmatch(url.raw_host):
        raise Refused("its host is no name and no address")
    if url.userinfo or url.fragment:
        raise Refused("it has a user name or a fragment")
    if len(text) > MAX_URL_CHARACTERS:
        raise Refused(f"it is longer than {MAX_URL_CHARACTERS} characters")
    return url


def _name(url: httpx.URL) -> str:
    """The host as it stands in Host and in TLS. Given its letters, Python looks another one up: it reads ß as ss."""
    return url.raw_host.decode("ascii").strip("[]")


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
