"""What stands in for a site's collectors: statsd for metrics, OpenTelemetry's for spans. Both listen on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import socketserver
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Span", "span_collector", "statsd"]


@contextlib.contextmanager
def statsd() -> Iterator[tuple[int, list[str]]]:
    """Listen as statsd does; give the port, and a list that what this package sends is added to."""
    sent: list[str] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            lines = self.request[0].decode(errors="replace").splitlines()
            sent.extend(line for line in lines if ".durable_spark." in line)

    with _serving(socketserver.UDPServer(("127.0.0.1", 0), Handler)) as port:
        yield port, sent


@dataclasses.dataclass(frozen=True)
class Span:
    """A span, with its strings and numbers alone."""

    name: str
    id: bytes
    trace: bytes
    parent: bytes
    attributes: Mapping[str, Any]


@contextlib.contextmanager
def span_collector() -> Iterator[tuple[int, list[Span]]]:
    """Listen as a collector of OTLP over HTTP does; give the port, and a list that spans are added to."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for of_resource in told.resource_spans:
                for of_scope in of_resource.scope_spans:
                    for span in of_scope.spans:
                        values = {each.key: each.value.string_value or each.value.int_value for each in span.attributes}
                        spans.append(Span(span.name, span.span_id, span.trace_id, span.parent_span_id, values))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield port, spans


@contextlib.contextmanager
def _serving(server: socketserver.UDPServer | ThreadingHTTPServer) -> Iterator[int]:
    with server:
        thread = threading.Thread(target=server.serve_forever, name="collector")
        thread.start()
        try:
            yield int(server.socket.getsockname()[1])
        finally:
            server.shutdown()
            thread.join()
