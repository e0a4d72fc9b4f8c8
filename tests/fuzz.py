"""Inputs for readers of foreign bytes: valid files with changed bytes and fields, and bytes at random.

check() runs a reader on them in this process. FEW are in `make test`, MANY in `make test-all`. They are the
same in each run; a failure is printed with its input.
"""

import asyncio
import contextlib
import copy
import json
import resource
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError

FEW, MANY = 200, 10_000
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
MAX_GROWTH = 1 << 29  # bytes of memory that a reader of small files may take at its peak
MAX_ADDRESSES = 1 << 33  # and of addresses, so that a bomb ends in a MemoryError and not in a killed machine

PIECES = [b"", b"\0", b"\xff", b'"', b"'", b"\n", b"\r", b",", b"{", b"}", b"[", b"]", b":", b"-", b"9" * 30]
PIECES += [
    b"\xff" * 4,
    b"\0" * 8,
    b"\x7f\xff\xff\xff",
    b"[" * 2000,
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"1e999",
]
PIECES += [b"null", b"*a", b"&a ", b"<<: ", b"!!", b"../", b"\xef\xbb\xbf", b"\x1b[31m", b"\0" * 512]
PIECES += ["again"] * 4 + ["random"] * 8
LENGTHS = [0, 0, 1, 1, 2, 4, 16, 64, 512]
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    1 << 31,
    -(1 << 63),
    1 << 63,
    10**30,
    10**4000,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
]
ODD += [
    float("nan"),
    float("inf"),
    "\0",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "a" * 5000,
    "1",
    "#12",
    [],
    {},
    [[]],
]
ACTS = ("replace", "replace", "replace", "remove", "rename", "repeat")
ODD += [
    [None],
    ["x"],
    [1, 2, 3],
    {"": 0},
    {"a": {"b": []}},
    "samples-1",
    "wise_ft 0.5",
    "\x1b[2J",
    "é",
    "None",
]


class Choices:
    """Choices by bytes that hypothesis draws at once, which is ten times as fast as one by one."""

    def __init__(self, entropy: bytes):
        self.entropy = iter(entropy)

    def number(self) -> int:
        return next(self.entropy, 0) << 8 | next(self.entropy, 0)

    def of(self, items: Sequence):
        return items[self.number() % len(items)]


def made_by(make: Callable[[Choices], object], size: int = 40) -> st.SearchStrategy:
    """What `make` returns for choices at random.

    Args:
        size: bytes of entropy; later choices are the first items.
    """
    return st.binary(min_size=size, max_size=size).map(lambda entropy: make(Choices(entropy)))


DEEP = [b"[" * 1_000_000, b'{"a":' * 100_000, b"1" * 5000, b"", b"null", b"\xff\xfe{\0}\0"]


def changed_bytes(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """One of the seeds with up to six pieces removed, inserted or repeated; or no seed at all."""
    return made_by(lambda choices: edited(choices.of(seeds), choices))


def edited(seed: bytes, choices: Choices) -> bytes:
    number = choices.number() % 7
    if not number:
        return bytes(choices.entropy)
    data = bytearray(seed)
    for _ in range(number):
        start = choices.number() % (len(data) + 1)
        removed, piece = data[start : start + choices.of(LENGTHS)], choices.of(PIECES)
        piece = {"again": removed * 2, "random": choices.number().to_bytes(2, "big")}.get(piece, piece)
        data[start : start + len(removed)] = piece
    return bytes(data)


def changed_values(*seeds: object) -> st.SearchStrategy[object]:
    """One of the seeds, of JSON, with up to three values in it replaced, removed, renamed or repeated."""
    return made_by(lambda choices: changed(choices.of(seeds), choices))


def changed(seed: object, choices: Choices) -> object:
    value = {"": copy.deepcopy(seed)}
    for _ in range(1 + choices.number() % 3):
        parents = list(_parents(value))
        parent, key = choices.of(parents)
        act, odd = choices.of(ACTS), copy.deepcopy(choices.of(ODD))
        if act == "replace" or parent is value:
            parent[key] = odd
        elif isinstance(parent, list):
            parent[key : key + 1] = [] if act == "remove" else [parent[key]] * 2
        else:
            inner = parent.pop(key)
            if act != "remove":
                parent[f"{key} " if act == "rename" else str(odd)[:50]] = inner
    return value[""]


def _parents(value: object) -> Iterator[tuple[dict | list, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _parents(inner)


def json_files(*seeds: object) -> st.SearchStrategy[bytes]:
    """JSON with changed values, and with changed bytes."""
    return made_by(lambda choices: changed_json(choices.of(seeds), choices))


def changed_json(seed: object, choices: Choices) -> bytes:
    act = choices.number() % 16
    if not act:
        return choices.of(DEEP)
    if act < 4:
        return edited(json.dumps(seed, indent=1).encode(), choices)
    try:
        return json.dumps(changed(seed, choices)).encode()
    except ValueError:  # a repeated number is one of more digits than Python writes
        return b"1" * 5000


def check(
    count: int,
    inputs: st.SearchStrategy,
    act: Callable[[object], object],
    expected: tuple[type[BaseException], ...] = (UserError,),
    valid: Sequence = (),
    max_growth: int = MAX_GROWTH,
) -> None:
    """Assert that `act` ends in a value or in an expected exception, within bounded memory.

    Args:
        count: of inputs.
        valid: inputs that raise nothing, or the reader would refuse the changed ones for another reason.
    """
    for value in valid:
        act(value)

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # a failure is shown at once; to shrink it takes minutes
        report_multiple_bugs=False,
    )
    @given(inputs)
    def each(value: object) -> None:
        with contextlib.suppress(*expected):
            act(value)

    before = _peak()
    with few_addresses():
        each()
    assert _peak() - before < max_growth, f"{(_peak() - before) >> 20} MiB more than before"


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def few_addresses() -> Iterator[None]:
    """At most MAX_ADDRESSES more than this process has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Asked:
    """An app that is asked without a server: one request at a time, in one event loop.

    The loop has a thread of its own: playwright's holds the main thread once a test has opened a page.
    An exception in the app, which a server would answer with status 500 and print, is raised.
    """

    def __init__(self, app):
        self.app, self.loop, self.thread = app, asyncio.new_event_loop(), ThreadPoolExecutor(1)

    def __call__(self, method: str, path: str, query: bytes = b"", headers=(), body: bytes = b"") -> tuple:
        """Status and body of the answer."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": urllib.parse.unquote(path, errors="replace"),
            "raw_path": path.encode("utf-8", "replace"),
            "query_string": query,
            "headers": [(b"host", b"127.0.0.1"), *headers],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
            "app": self.app,
        }
        messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

        async def receive() -> dict:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        self.thread.submit(self.loop.run_until_complete, self.app(scope, receive, send)).result()
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def ends_in(act: Callable[[], object], *expected: type[BaseException]) -> None:
    """Assert that `act` ends in a value or an expected exception, in bounded memory."""
    with few_addresses(), contextlib.suppress(*expected):
        act()
