"""The page and its JSON API, on loopback only.

  GET  /                   the page
  GET  /api/search         text, minus, like and unlike (each may be repeated), offset, limit
  POST /api/search         the same, and an encoded image as the body
  GET  /api/samples/NUMBER what is known about a sample
  GET  /thumbnails/NUMBER  a small JPEG of it
  GET  /images/NUMBER      its encoded image as it is in the source

Nothing is addressed by a path. Errors are `{"error": MESSAGE}`. Each connection has one request and a deadline, and
only so many are served at once; further ones wait.
"""

import base64
from collections.abc import Mapping
import errno
import hashlib
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import importlib.resources
import io
import json
import re
import socket
import socketserver
import threading
import time
from typing import Any, NamedTuple

from absl import logging

from declip_jax.data.sources import BadSample
from declip_jax.image_search.pictures import Picture
from declip_jax.image_search.requests import MAX_BODY, MAX_TARGET, RequestError, body_size, check_headers, parse_search
from declip_jax.image_search.searcher import Searcher

_HOST = "127.0.0.1"
_SECONDS = 30.0  # for reading a request, and again for sending the answer
_CONNECTIONS = 32  # served at once
_OF_SAMPLE = re.compile(r"/(images|thumbnails|api/samples)/([0-9]{1,12})")
_HEADERS = {
  "Cache-Control": "no-store",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
}


class _Answer(NamedTuple):
  """The answer to a request."""

  content: bytes
  media_type: str
  status: HTTPStatus = HTTPStatus.OK
  policy: str = "default-src 'none'; frame-ancestors 'none'; sandbox"


class SearchServer(ThreadingHTTPServer):
  """Serves the page; connections wait until `serve` is called.

  Args:
    port: port on 127.0.0.1; 0 for a free one.

  Attributes:
    url: the address of the page.
    page: the page.
    searcher: what answers queries.

  Raises:
    ValueError: the port is in use.
    OSError: the port cannot be used.
  """

  daemon_threads = True
  request_queue_size = 128
  searcher: Searcher

  def __init__(self, port: int):
    try:
      super().__init__((_HOST, port), _Handler)
    except OSError as error:
      if error.errno == errno.EADDRINUSE:
        raise ValueError(f"port {port} is in use: choose another one, or 0 for a free one") from error
      raise
    self.url, self.page = f"http://{_HOST}:{self.server_address[1]}/", _page()
    self._slots = threading.BoundedSemaphore(_CONNECTIONS)

  def server_bind(self) -> None:
    """Binds without `HTTPServer`'s look-up of the name of this host, which may take seconds."""
    socketserver.TCPServer.server_bind(self)
    self.server_name, self.server_port = _HOST, self.server_address[1]

  def serve(self, searcher: Searcher) -> None:
    """Answers requests until `shutdown` is called or the process is interrupted."""
    self.searcher = searcher
    try:
      self.serve_forever()
    finally:
      self.server_close()

  def process_request(self, request: Any, client_address: Any) -> None:
    self._slots.acquire()
    super().process_request(request, client_address)

  def process_request_thread(self, request: Any, client_address: Any) -> None:
    try:
      super().process_request_thread(request, client_address)
    finally:
      self._slots.release()

  def handle_error(self, request: Any, client_address: Any) -> None:
    logging.info("a connection ended early", exc_info=True)


class _Reader(io.RawIOBase):
  """What a connection receives until a deadline; `TimeoutError` after it, however slowly bytes arrive."""

  def __init__(self, connection: socket.socket, seconds: float):
    self._connection, self._deadline = connection, time.monotonic() + seconds

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    left = self._deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError("the request took too long")
    self._connection.settimeout(left)
    return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
  """One connection, which has one request (HTTP/1.0)."""

  server: SearchServer
  server_version, sys_version = "declip-search", ""

  def setup(self) -> None:
    super().setup()
    self.rfile.close()
    self.rfile = io.BufferedReader(_Reader(self.connection, _SECONDS))

  def do_GET(self) -> None:
    self._send(self._answer("GET"))

  def do_POST(self) -> None:
    self._send(self._answer("POST"))

  def _answer(self, method: str) -> _Answer:
    try:
      return self._route(method)
    except RequestError as error:
      return _error(error.status, str(error))
    except BadSample as error:
      return _error(HTTPStatus.NOT_FOUND, str(error))
    except TimeoutError as error:
      return _error(HTTPStatus.REQUEST_TIMEOUT, str(error))
    except ConnectionError:
      raise  # nobody waits for the answer
    except Exception:
      logging.exception("%s %.200r failed", method, self.path)
      return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the terminal of the server says why")

  def _route(self, method: str) -> _Answer:
    path, _, parameters = self.path.partition("?")
    check_headers(self.headers, is_page=method == "GET" and path == "/")
    if len(self.path) > MAX_TARGET:
      raise RequestError(HTTPStatus.REQUEST_URI_TOO_LONG, f"an address of {len(self.path)} bytes: {MAX_TARGET} at most")
    if path == "/api/search":
      return self._search(parameters, self._body() if method == "POST" else None)
    if method != "GET":
      raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, f"{method} {path!r:.80}: expected GET, or POST /api/search")
    if path == "/":
      return self.server.page
    if of_sample := _OF_SAMPLE.fullmatch(path):
      return self._of_sample(of_sample[1], int(of_sample[2]))
    raise RequestError(HTTPStatus.NOT_FOUND, f"{path!r:.80}: nothing has this address")

  def _body(self) -> bytes:
    size = body_size(self.headers)
    body = self.rfile.read(size)
    if len(body) < size:
      raise RequestError(HTTPStatus.BAD_REQUEST, f"a body of {len(body)} bytes: expected Content-Length, {size}")
    return body

  def _search(self, parameters: str, image: bytes | None) -> _Answer:
    query, offset, limit = parse_search(parameters, image)
    searcher, start = self.server.searcher, time.perf_counter()
    try:
      hits = searcher.search(query, offset, limit)
    except ValueError as error:
      raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error
    results = [
      {"score": float(cosine), **self._sample(int(number))}
      for number, cosine in zip(hits.number, hits.cosine, strict=True)
    ]
    seconds = time.perf_counter() - start
    return _json({"total": hits.total, "offset": offset, "seconds": seconds, "results": results})

  def _sample(self, number: int) -> dict[str, Any]:
    links = {name: f"/{path}/{number}" for name, path in (("image", "images"), ("thumbnail", "thumbnails"))}
    return self.server.searcher.sample(number) | links

  def _of_sample(self, kind: str, number: int) -> _Answer:
    searcher = self.server.searcher
    try:
      searcher.check_number(number)
    except ValueError as error:
      raise RequestError(HTTPStatus.NOT_FOUND, str(error)) from error
    if kind == "api/samples":
      return _json(self._sample(number))
    picture: Picture = (
      searcher.pictures.thumbnail(number) if kind == "thumbnails" else searcher.pictures.original(number)
    )
    return _Answer(*picture)

  def _send(self, answer: _Answer) -> None:
    self.connection.settimeout(_SECONDS)
    self.send_response(answer.status)
    for name, value in {**_HEADERS, "Content-Security-Policy": answer.policy}.items():
      self.send_header(name, value)
    self.send_header("Content-Type", answer.media_type)
    self.send_header("Content-Length", str(len(answer.content)))
    self.end_headers()
    self.wfile.write(answer.content)

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """Answers requests that `BaseHTTPRequestHandler` cannot parse."""
    status = HTTPStatus(code)
    self._send(_error(status, message or status.phrase))

  def log_message(self, format: str, *args: Any) -> None:
    logging.info("%.500s", format % args)


def _json(fields: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> _Answer:
  return _Answer(json.dumps(fields).encode(), "application/json", status)


def _error(status: HTTPStatus, message: str) -> _Answer:
  return _json({"error": message}, status)


def _page() -> _Answer:
  """The page, whose policy allows its own style and script, images of this server and nothing else."""
  text = importlib.resources.files("declip_jax.image_search").joinpath("page.html").read_text(encoding="utf-8")
  text = text.replace("MAX_BODY", str(MAX_BODY))
  hashes = {}
  for tag in ("style", "script"):
    (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    hashes[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
  policy = (
    f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src 'self' blob: data:; "
  )
  policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  return _Answer(text.encode(), "text/html; charset=utf-8", policy=policy)
