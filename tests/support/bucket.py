"""Google Cloud Storage in this process: gcp-storage-emulator behind a proxy, which injects faults and keeps preconditions.

The emulator ignores ifGenerationMatch and the generation of a download, and names none in downloads; the proxy compares them, for
uploads one at a time, and adds it.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

NEEDED = ("gcsfs", "gcp_storage_emulator", "google.cloud.storage")
BUCKET = "runs"
# What happens to a request, by its method and path: nothing, an HTTP status, seconds of delay, or a connection that breaks off
# before ("break") or after ("lose") the request was carried out, or in the middle of the answer ("cut").
Fault = int | float | str | None
Rule = Callable[[str, str], Fault]


def missing() -> str:
    """Returns the first package that is missing, '' if all are there."""
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return name
    return ""


class Service:
    """The proxy: its address, its requests so far, and the rule for faults."""

    def __init__(self, port: int):
        self.port, self.rule, self.count = port, no_fault, 0
        self.writes = threading.Lock()

    @contextmanager
    def faults(self, rule: Rule) -> Iterator[None]:
        """Faults by a rule for requests of objects. google-cloud-storage asks for the bucket itself at times, in a thread."""
        self.rule = lambda method, path: None if re.search(r"/b/[^/]+(\?|$)", path) else rule(method, path)
        try:
            yield
        finally:
            self.rule = no_fault


def no_fault(method: str, path: str) -> Fault:
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which delays an answer of two parts by 40 ms
    service: Service

    def carry_out(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self.read_chunks()
        service = self.service
        service.count += 1
        fault = service.rule(self.command, self.path)
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            return self.answer(fault, [("Content-Type", "application/json")], b'{"error": {"message": "injected"}}')
        elif fault == "break":
            return self.hang_up()
        expected = parse_qs(urlsplit(self.path).query).get("ifGenerationMatch")
        if self.command in ("POST", "PUT"):
            with service.writes:
                if expected and self.generation(body) != expected[0]:
                    return self.answer(412, [("Content-Type", "application/json")], b'{"error": {"message": "changed"}}')
                answer = self.forward(self.command, self.path, body)
        else:
            answer = self.forward(self.command, self.path, body)
        if fault == "lose":
            return self.hang_up()
        status, headers, content = answer
        if self.command == "GET" and status in (200, 206) and "alt=media" in self.path:
            generation = self.generation(b"")
            if parse_qs(urlsplit(self.path).query).get("generation", [generation]) != [generation]:
                return self.answer(404, [("Content-Type", "application/json")], b'{"error": {"message": "no such generation"}}')
            headers = [*headers, ("x-goog-generation", generation)]
        self.answer(status, headers, content, len(content) // 2 if fault == "cut" else None)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = carry_out

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def generation(self, body: bytes) -> str:
        """Returns the generation of the object that a request writes, "0" if there is none."""
        parts = urlsplit(self.path)
        bucket = parts.path.partition("/b/")[2].split("/")[0]
        named = parse_qs(parts.query).get("name")
        name = named or [json.loads(b'"' + found[1] + b'"') for found in [NAME.search(body)] if found]
        name = name or [unquote(parts.path.partition("/o/")[2])]
        status, _, content = self.forward("GET", f"/storage/v1/b/{bucket}/o/{quote(name[0], safe='')}", b"")
        return json.loads(content)["generation"] if status == 200 else "0"

    def forward(self, method: str, path: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in DROPPED}
        connection.request(method, path, body or None, kept | {"Content-Length": str(len(body)), "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() not in DROPPED], content

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


NAME = re.compile(rb'"name": ?"((?:[^"\\]|\\.)*)"')
DROPPED = ("connection", "content-length", "transfer-encoding", "keep-alive", "date", "server")


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:  # a client that has closed its connection
        pass


@contextmanager
def serving() -> Iterator[Service]:
    """Runs the service for the block, with the variables that gcsfs, TensorStore and google-cloud-storage read."""
    from gcp_storage_emulator.server import RequestHandler, create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    RequestHandler.disable_nagle_algorithm = True
    socketserver.BaseServer.handle_error = Proxy.handle_error  # the emulator's prints a traceback
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as free:
        port = free.server_address[1]
    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    service = Service(port)
    proxy = Proxy(("127.0.0.1", 0), type("Bound", (Handler,), {"service": service}))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    values = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_CLOUD_PROJECT": "test"}
    # The machine is asked for credentials; where there is no network, each question would wait for an answer.
    values |= {"NO_GCE_CHECK": "true"} | dict.fromkeys(("GCE_METADATA_ROOT", "GCE_METADATA_HOST"), url.removeprefix("http://"))
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield service
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        proxy.shutdown()
        emulator.stop()


def download(path, folder: Path) -> Path:
    """Copies a folder of the bucket to a local one."""
    for name in path.files():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((path / name).read_bytes())
    return folder
