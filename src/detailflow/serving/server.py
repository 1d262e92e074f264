"""The process: a socket, uvicorn, and an end that loses nothing."""

import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn

from detailflow.errors import DetailFlowError, explained
from detailflow.serving.app import App

KEEP_ALIVE = 75  # seconds that an idle connection stays open: more than the usual reverse proxy keeps one
MOST_CONNECTIONS = 1000
BACKLOG = 512
_OF_CLIENTS = ("Unsupported upgrade request", "No supported WebSocket library", "Invalid HTTP request")


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for lines on malformed requests, with which clients could fill the log, and on cancelled work."""
    message = record.getMessage()
    return not message.startswith(_OF_CLIENTS) and "asyncio.exceptions.CancelledError" not in message


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 is any free one.

    Raises:
        DetailFlowError: if that cannot be.
    """
    if not 0 <= port < 2**16:
        raise DetailFlowError(f"--port must be 0 to {2**16 - 1}, not {port}")
    if not host.strip():
        raise DetailFlowError("--host is empty: give an address of this machine, such as 127.0.0.1")
    problem, hint = f"cannot listen on {host} port {port}", "give another --host or --port"
    with explained(problem, (OSError, UnicodeError), hint):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach a socket."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def url(listener: socket.socket) -> str:
    """Return where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, which stops in order at SIGTERM and Ctrl-C: it finishes what runs and refuses what comes.

    Attributes:
        interrupted: whether it was Ctrl-C; a second one waits for nothing.
    """

    def __init__(self, app: App, access_log: bool = False) -> None:
        config = uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(app.service.config.grace)),
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_news)  # after the configuration, which sets up that logger
        self.app, self.interrupted = app, False

    async def main_loop(self) -> None:
        """Serve until told to stop."""
        await super().main_loop()
        self.app.service.batcher.drain()  # before uvicorn waits for the answers that are not finished

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal. Uvicorn would raise it again in its loop: an end in order has exit status 0, after SIGTERM."""
        if sig == signal.SIGINT:
            self.force_exit, self.interrupted = self.should_exit, True
        self.should_exit = True
