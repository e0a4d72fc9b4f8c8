"""Images over HTTP, from the server that a person has named, and from public ones; from no other.

A table of a stranger names URLs, and a server can send a request on to any address. Neither may reach the
services of this machine and of its network:

    --images https://host/images/    the host, at any address that it has
    --images https://                any host, at public addresses (not 127.0.0.1, 10.0.0.0/8, 169.254.0.0/16)
    sent on by a server              to the same host; to another one at a public address; never from https to
                                     http
"""

import ipaddress
import socket
from collections.abc import Callable

import aiohttp
from aiohttp.resolver import ThreadedResolver
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from data_prep.masked import masked_url

MAX_BYTES = 1 << 28  # of one image; many are fetched at once
SILENT_S, TOTAL_S = 60, 300  # without a byte, and for all of one image
MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
PARTIAL = 206
DEFAULT_PORTS = {"http": 80, "https": 443}


class NotFetched(Exception):
    """Why a URL is not asked for, or its answer not read; another attempt ends in the same way."""


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from everywhere, so not one of this machine or its network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


class _Resolver(ThreadedResolver):
    """The addresses of the named server, and the public addresses of others."""

    def __init__(self, named: tuple[str, int] | None):
        super().__init__()
        self.named = named

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list:
        # What is checked here is what is connected to: a second question could be answered otherwise.
        found = await super().resolve(host, port, family)
        if _is_named((host, port), self.named):
            return found
        if not (public := [address for address in found if is_public(address["host"])]):
            raise NotFetched(_private(host))
        return public


class ImageServer(HTTPFileSystem):
    """fsspec's file system, which asks for what it may.

    Args:
        root: The folder or URL of images, "https://host/images"; or "https://", for any host.
    """

    def __init__(self, root: str, **options):
        super().__init__(**options)
        self.named = None if root.endswith("://") else _origin(URL(root))
        self.get_client = self._client

    async def _client(self, **options) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=_Resolver(self.named))
        timeout = aiohttp.ClientTimeout(total=TOTAL_S, sock_connect=SILENT_S, sock_read=SILENT_S)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, **options)

    async def _cat_file(self, url, start=None, end=None, take=None, **options) -> bytes:
        """The bytes of a file, or those from `start` to `end`.

        Args:
            take: Is called with the bytes that come; what it raises ends the transfer.
        """
        try:
            return await self._content_of(url, take, start, end)
        except TimeoutError:
            if end is not None:  # of a shard, which is asked for again
                raise
            raise NotFetched(
                f"its server sends no byte for {SILENT_S} seconds, or not all within {TOTAL_S}"
            ) from None

    async def _content_of(
        self, url: str, take: Callable[[int], None] | None, start: int | None, end: int | None
    ) -> bytes:
        session, target = await self.set_session(), self.encode_url(url)
        headers = {} if end is None else {"Range": f"bytes={start or 0}-{end - 1}"}
        for _ in range(MAX_REDIRECTS + 1):
            self._check_literal(target)
            async with session.get(target, headers=headers, allow_redirects=False) as answer:
                place = answer.headers.get("Location") if answer.status in REDIRECTS else None
                if place is None:
                    self._raise_not_found_for_status(answer, url)
                    if headers and answer.status != PARTIAL and _exceeds(answer, end - (start or 0)):
                        raise NotFetched("its server answers no range requests; serve it from one that does")
                    return await _content(answer, take)
            target = next_target(target, place)
        raise NotFetched(f"its server sends on more than {MAX_REDIRECTS} times")

    def _check_literal(self, target: URL) -> None:
        """Refuse an address that no resolver is asked for."""
        host = target.raw_host  # that is connected to
        if not (":" in host or host.replace(".", "").isdigit()):
            return
        try:
            public = is_public(host)
        except ValueError:  # 127.1, another way to write 127.0.0.1
            public = False
        if not public and not _is_named(_origin(target), self.named):
            raise NotFetched(_private(host))


def _origin(url: URL) -> tuple[str, int]:
    return url.raw_host, url.port


def _is_named(origin: tuple[str, int], named: tuple[str, int] | None) -> bool:
    """Whether a host and port are those of the root; http://host may send on to https://host."""
    return named is not None and origin in (named, *([(named[0], 443)] if named[1] == 80 else []))


def _private(host: str) -> str:
    return f"{host} has no public address; to read from it, pass --images with this host"


def next_target(before: URL, place: str) -> URL:
    """Where a server sends a request on to.

    Args:
        place: Its header Location.

    Raises:
        NotFetched: it is no URL of HTTP, or one without the encryption that was asked for.
    """
    try:
        target = before.join(URL(place))
    except ValueError:
        target = URL()
    if target.scheme not in DEFAULT_PORTS or not target.host:
        raise NotFetched(f"its server sends on to {masked_url(place)[:200]!r}, which is no URL of HTTP")
    if before.scheme == "https" and target.scheme == "http":
        raise NotFetched(f"its server sends on from https to http ({target.host})")
    same = _origin(before) == _origin(target)  # a password is for the server that it was given for
    return target.with_user(before.user).with_password(before.password) if same and before.user else target


def _exceeds(answer: aiohttp.ClientResponse, n_bytes: int) -> bool:
    return answer.content_length is None or answer.content_length > n_bytes


async def _content(answer: aiohttp.ClientResponse, take: Callable[[int], None] | None) -> bytes:
    data = bytearray()
    async for chunk in answer.content.iter_chunked(1 << 16):
        if take:
            take(len(chunk))
        data += chunk
        if len(data) > MAX_BYTES:
            raise NotFetched(f"more than {MAX_BYTES >> 20} MiB")
    return bytes(data)
