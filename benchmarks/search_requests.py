"""Requests to a search page that is being served: python benchmarks/search_requests.py PORT --queries 250

Prints the seconds that each query took, as JSON; no query is asked twice. `hostile` makes requests that no browser
sends, for benchmarks/search.py and the tests.
"""

import http.client
import json
import random
import socket
import struct
import time
from urllib.parse import quote, urlencode
import zlib

from command import parser

_WORDS = (
  "red",
  "blue",
  "green",
  "small",
  "large",
  "old",
  "new",
  "striped",
  "wooden",
  "round",
  "shoes",
  "shirt",
  "chair",
)
_ROUTES = ("/", "/images/", "/thumbnails/", "/api/samples/", "/api/search", "/static/", "/cgi-bin/")
_FILES = ("etc/passwd", "secret.txt", "proc/self/environ", "page.html", "windows/win.ini")
_UPS = ("../", "..%2f", "%2e%2e/", "%252e%252e%252f", "..\\", "..%5c", "....//", "..%c0%af", "./../", "..;/", "%00../")
_NUMBERS = (
  "-1",
  "1e9",
  "0x10",
  "９",
  "1_0",
  "0 ",
  "+1",
  "NaN",
  "9" * 12,
  "9" * 400,
  "",
  "1%0a",
  "1;ls",
  "${7*7}",
  "0.0",
)
_TEXTS = (
  "<script>alert(1)</script>",
  "'; DROP TABLE images;--",
  "\0",
  "\ud800",
  "a" * 1001,
  "😀" * 900,
  "\r\nSet-Cookie: a=b",
  " ",
)


def main() -> None:
  """Sends the queries one after the other and prints their seconds."""
  arguments = parser(__doc__)
  arguments.add_argument("port", type=int, help="port on 127.0.0.1")
  arguments.add_argument("--queries", type=int, default=250, help="number of queries (default: 250)")
  arguments.add_argument("--seed", type=int, default=0, help="of the queries (default: 0)")
  args = arguments.parse_args()
  rng = random.Random(args.seed)
  print(json.dumps([timed(args.port, query(rng, index)) for index in range(args.queries)]))


def query(rng: random.Random, index: int) -> str:
  """Parameters of a query of a new text; every fifth subtracts another, every tenth adds an image."""
  found = [("text", f"{' '.join(rng.sample(_WORDS, 4))} {rng.randrange(10**6)}")]
  if index % 5 == 0:
    found.append(("minus", f"{' '.join(rng.sample(_WORDS, 2))} {rng.randrange(10**6)}"))
  if index % 10 == 0:
    found.append(("like", str(rng.randrange(1000))))
  return urlencode(found)


def timed(port: int, parameters: str) -> float:
  """Seconds until the answer to a query has arrived.

  Raises:
    ValueError: the answer is an error.
  """
  start = time.perf_counter()
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request("GET", f"/api/search?{parameters}")
  answer = connection.getresponse()
  found = json.loads(answer.read())
  seconds = time.perf_counter() - start
  connection.close()
  if answer.status != 200 or len(found["results"]) != 24:
    raise ValueError(f"{parameters}: {answer.status} {found}")
  return seconds


def send(port: int, request: bytes) -> bytes:
  """The answer to the bytes of a request; what arrived, if the server closes the connection early."""
  with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
    received = []
    try:
      connection.sendall(request)
      connection.shutdown(socket.SHUT_WR)
      while part := connection.recv(2**16):
        received.append(part)
    except (ConnectionResetError, BrokenPipeError, OSError):
      pass
  return b"".join(received)


def request(target: str, body: bytes | None = None, method: str = "", **headers: str) -> bytes:
  """The bytes of a request; `headers` replace `Host`, and `Content_Length` of a body."""
  fields = {"Host": "localhost", **({} if body is None else {"Content_Length": str(len(body))}), **headers}
  lines = [f"{method or ('GET' if body is None else 'POST')} {target} HTTP/1.1"]
  lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
  return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + (body or b"")


def hostile(rng: random.Random) -> bytes:
  """A random request of a random kind."""
  return rng.choice(_KINDS)(rng)


def _traversal(rng: random.Random) -> bytes:
  ups = rng.choice(_UPS) * rng.randrange(1, 9)
  path = rng.choice(
    (f"{rng.choice(_ROUTES)}{ups}", "file:///", "//", "http://evil.example/", "/images/0/", "/images//")
  )
  return request(f"{path}{rng.choice(_FILES)}{rng.choice(('', '?text=a', '#', '%00.jpg'))}")


def _number(rng: random.Random) -> bytes:
  number = rng.choice(_NUMBERS)
  of_sample = f"{rng.choice(('/images/', '/thumbnails/', '/api/samples/'))}{quote(number, safe='%;')}"
  name = rng.choice(("like", "unlike", "offset", "limit"))
  return request(rng.choice((of_sample, f"/api/search?text=a&{urlencode({name: number})}")))


def _parameters(rng: random.Random) -> bytes:
  names = ("text", "minus", "like", "offset", "path", "__proto__", "text[]", "")
  texts = [rng.choice((*_TEXTS, *_NUMBERS)).encode("utf-8", "surrogatepass") for _ in range(rng.choice((1, 2, 9, 40)))]
  pairs = [f"{rng.choice(names)}={quote(text)}" for text in texts]
  return request(f"/api/search?{'&'.join(pairs)}{rng.choice(('', '&text=%ff', '&text=%', '&;&', '?'))}")


def _headers(rng: random.Random) -> bytes:
  wrong = rng.choice(
    (
      {"Host": "evil.example"},
      {"Host": "localhost.evil.example"},
      {"Host": "127.0.0.1@evil.example"},
      {"Host": ""},
      {"Host": "localhost\r\nHost: evil.example"},
      {"Origin": "http://evil.example"},
      {"Origin": "null"},
      {"Sec_Fetch_Site": "cross-site"},
      {"Transfer_Encoding": "chunked"},
      {"X": "y" * rng.choice((10, 70_000))},
      {f"X{number}": "y" for number in range(rng.choice((50, 200)))},
      {"Range": "bytes=0-99999999999", "Expect": "100-continue"},
    )
  )
  return request(rng.choice(("/images/0", "/api/search?text=a")), **wrong)


def _method(rng: random.Random) -> bytes:
  method = rng.choice(("PUT", "DELETE", "TRACE", "CONNECT", "OPTIONS", "POST", "get", "G\0T", "HEAD", "A" * 9000))
  return request(
    rng.choice(("/", "/images/0", "/api/samples/0", "*", "localhost:22")), rng.choice((None, b"x")), method
  )


def _bodies(rng: random.Random) -> bytes:
  noise = rng.randbytes(rng.randrange(1, 3000))
  body = rng.choice(
    (b"", noise, b"\xff\xd8\xff" + noise, _png(30_000, 30_000), _png(1, 1), b"<svg onload=alert(1)>", b"GIF89a<script>")
  )
  sizes = (
    {},
    {"Content_Length": "-1"},
    {"Content_Length": "9" * 11},
    {"Content_Length": "9" * 99},
    {"Content_Length": "1e3"},
  )
  sizes += ({"Content_Length": str(len(body) + 9)}, {"Transfer_Encoding": "chunked"})
  return request(f"/api/search{rng.choice(('', '?text=a', '?like=-1'))}", body, **rng.choice(sizes))


def _png(width: int, height: int) -> bytes:
  """A PNG without pixels."""
  header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _noise(rng: random.Random) -> bytes:
  starts = (
    b"",
    b"GET / HTTP/9.9\r\n",
    b"GET /\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01",
    b"\r\n" * 50,
  )
  longs = (
    b"GET /" + b"a" * 70_000,
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    rng.randbytes(500),
  )
  return rng.choice((rng.choice(starts) + rng.randbytes(rng.randrange(80)), rng.choice(longs)))


_KINDS = (_traversal, _number, _parameters, _headers, _method, _bodies, _noise)

if __name__ == "__main__":
  main()
