"""What served pages share: a loopback server, its security headers, and errors as one sentence of JSON.

A page is one HTML file that loads nothing from elsewhere. Only its routes are answered; no folder is served.
"""

import contextlib
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data_prep.errors import UserError
from data_prep.strict_json import STRICT, parse_json
from data_prep.terminal import say

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src"
        " 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
MAX_BODY_BYTES = 32 << 20


class Refused(Exception):
    """A request that cannot be answered: one sentence for the user, and an HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.message, self.status = message, status


def application(
    page: Path,
    routes: Sequence[Route],
    host: str = LOOPBACK[0],
    is_private: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> Starlette:
    """The app: `page` at /, and `routes`. A Refused or UserError becomes {"error": its sentence}.

    Args:
        is_private: Other pages may not send requests that are no GET; and on other hosts than loopback, only
            who has the printed address, which has a random token, is answered.
        on_end: Called when the server ends.
        host: Address that the server is bound to. On loopback, only loopback's host names are accepted, so a
            foreign page cannot reach the server under a name that it controls (DNS rebinding).
    """
    content = page.read_text(encoding="utf-8")

    async def show_page(_: Request) -> Response:
        return HTMLResponse(content)

    async def on_refused(_: Request, error: Refused) -> Response:
        return JSONResponse({"error": error.message}, error.status)

    async def on_user_error(_: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        # not request.url, which cannot be made of every query
        message = f"{request.method} {request.scope['path']:.200}: {error.detail}"
        return JSONResponse({"error": message}, error.status_code, error.headers)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            on_end()

    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    token = secrets.token_urlsafe(16) if is_private and host not in LOOPBACK else ""
    app = Starlette(
        routes=[Route("/", show_page), *routes],
        middleware=[
            Middleware(_WithSecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            *([Middleware(_Guard, token=token)] if is_private else []),
        ],
        lifespan=lifespan,
        exception_handlers={Refused: on_refused, UserError: on_user_error, HTTPException: on_http_error},
    )
    app.state.token, app.state.on_end = token, on_end
    return app


class _WithSecurityHeaders:
    """Adds SECURITY_HEADERS to every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        added = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _Guard:
    """Refuses what a foreign page sends (same_origin) and, if there is a token, who does not have it.

    The address with the token sets a cookie, which the page's own requests then send.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, answer = Request(scope), None
        cookie = f"review-{(scope.get('server') or ('', 0))[1]}"  # cookies of a host are shared by its ports
        if self.token and self._is_token(request.query_params.get("token")):
            if request.method == "GET" and scope["path"] == "/":
                answer = RedirectResponse("/", 303)  # so that the token does not stay in the address bar
                answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
        elif self.token and not self._is_token(request.cookies.get(cookie)):
            message = "this page is private: open the address that the command printed, with its token"
            answer = JSONResponse({"error": message}, 403)
        if answer is None and request.method not in ("GET", "HEAD"):
            try:
                same_origin(request)
            except Refused as refused:
                answer = JSONResponse({"error": refused.message}, refused.status)
        await (answer or self.app)(scope, receive, send)

    def _is_token(self, text: str | None) -> bool:
        return bool(text) and secrets.compare_digest(text.encode(), self.token.encode())


async def body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The request's body. At most `max_bytes` are held in memory, however much is sent.

    Raises:
        Refused: It is larger, or the client disconnected.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= max_bytes:
                parts.append(part)
            elif size > 8 * max_bytes:
                # Up to here the rest is read and dropped: a browser sees no response before all is sent.
                break
    except ClientDisconnect:
        raise Refused("the request ended before its body was complete") from None
    if size > max_bytes:
        raise Refused(f"more than {max_bytes >> 20} MiB were sent; send a smaller file", 413)
    return b"".join(parts)


async def json_body(request: Request, max_bytes: int) -> dict:
    """The JSON object in a request's body.

    Raises:
        Refused: as body(), or it is none.
    """
    try:
        payload = parse_json(await body(request, max_bytes), **STRICT)
    except ValueError as error:
        raise Refused(f"the request is not valid JSON ({error!s:.80})") from None
    if not isinstance(payload, dict):
        raise Refused("the request must be a JSON object")
    return payload


def same_origin(request: Request) -> None:
    """Guard of all requests that are no GET.

    Raises:
        Refused: A foreign page sent this. Browsers say where a POST is from in Origin; Sec-Fetch-Site, which
            is harder to forget, is sent over https and to loopback only.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    is_foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
    if is_foreign or request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused("this request comes from another page and is refused", 403)


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON: a form of a foreign page cannot declare it.

    Raises:
        Refused: the content type is another one.
    """
    kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(f"the content type is {kind:.80}; it must be application/json", 415)


def serve(app: Starlette, host: str, port: int, title: str) -> None:
    """Serve until Ctrl-C; the address is printed once the port is open.

    Args:
        port: 0 takes a free port.
        title: First word of the printed line "TITLE: http://...".

    Raises:
        UserError: The port cannot be opened.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        app.state.on_end()
        reason = getattr(error, "strerror", "a port is from 0 to 65535")
        raise UserError(
            f"--host {host} --port {port}: cannot be opened ({reason}); pass another --port, or 0 for"
            " a free one"
        ) from None
    listening.listen(256)
    shown = f"[{host}]" if ":" in host else host
    token = app.state.token
    address = f"http://{shown}:{listening.getsockname()[1]}" + (f"/?token={token}" if token else "")
    say(f"{title}: {address}    (Ctrl-C stops it)", flush=True)
    if host not in LOOPBACK and not token:
        say(
            f"warning: anyone who can reach {host} can use this page; there is no password",
            file=sys.stderr,
            flush=True,
        )
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn shuts down cleanly, then raises it once more
        server.run(sockets=[listening])
