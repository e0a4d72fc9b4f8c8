"""What the pages that are served have in common: a loopback server, its guards, and answers that are
sentences.

A page is one HTML file that loads nothing from elsewhere. Nothing but its own routes is answered: no folder
is served."""

import contextlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data_prep.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GUARDS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src"
        " 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
MAX_BODY_BYTES = 32 << 20


class Refused(Exception):
    """A request that cannot be answered: a sentence for the one who asked, and an HTTP status."""

    def __init__(self, said: str, status: int = 400):
        super().__init__(said)
        self.said, self.status = said, status


def application(page: Path, routes: Sequence[Route], host: str = LOOPBACK[0]) -> Starlette:
    """The app: `page` at /, and `routes`; a Refused or UserError of theirs becomes {"error": its sentence}.

    Args:
        host: that it will be bound to. Bound to loopback it answers to loopback's names alone, so that no
            page from elsewhere reaches it under a name of its own (DNS rebinding).
    """
    content = page.read_text(encoding="utf-8")

    async def show(_: Request) -> Response:
        return HTMLResponse(content)

    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse({"error": error.said}, error.status)

    async def mistaken(_: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    async def unknown(request: Request, error: HTTPException) -> Response:
        return JSONResponse(
            {"error": f"{request.method} {request.url.path}: {error.detail}"},
            error.status_code,
            error.headers,
        )

    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    return Starlette(
        routes=[Route("/", show), *routes],
        middleware=[
            Middleware(_Guarded),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        ],
        exception_handlers={Refused: refused, UserError: mistaken, HTTPException: unknown},
    )


class _Guarded:
    """Puts GUARDS on every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in GUARDS.items()),
                ]
            await send(message)

        await self.app(scope, receive, guarded)


async def body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """The request's body; of a larger one no more than `most` bytes are ever held.

    Raises:
        Refused: it is larger, or whoever sent it has gone.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif (
                size > 8 * most
            ):  # up to here it is read and dropped: a browser hears no answer before it has sent all
                break
    except ClientDisconnect:
        raise Refused("the request ended before its body did") from None
    if size > most:
        raise Refused(f"more than {most >> 20} MiB were sent; a smaller file is wanted", 413)
    return b"".join(parts)


def same_origin(request: Request) -> None:
    """For routes that write.

    Raises:
        Refused: a page from elsewhere sent this (a browser says so itself, in Sec-Fetch-Site).
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused("this was sent by another page, and is not done", 403)


def serve(app: Starlette, host: str, port: int, what: str) -> None:
    """Answer until Ctrl-C; the address is printed when it is open.

    Args:
        port: 0 takes a free one.
        what: of the sentence "WHAT: http://...".

    Raises:
        UserError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be opened ({error.strerror}); pass another --port, or 0 for"
            " a free one"
        ) from None
    listening.listen(256)
    shown = f"[{host}]" if ":" in host else host
    print(f"{what}: http://{shown}:{listening.getsockname()[1]}    (Ctrl-C ends it)", flush=True)
    if host not in LOOPBACK:
        print(
            f"anyone who reaches {host} can see this; nobody is asked for a password",
            file=sys.stderr,
            flush=True,
        )
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    )
    with contextlib.suppress(KeyboardInterrupt):  # it has ended in good order, and then says so once more
        server.run(sockets=[listening])
