"""The JSON API over real connections: results equal direct computation, and hostile requests get errors."""

import http.client
import io
import json
from pathlib import Path
import random
import socket
import time
from urllib.parse import parse_qs, urlencode, urlsplit

from image_search import gallery
from image_search.gallery import BROKEN, CAPTION, COUNT, SECRET, encoded
import numpy as np
from pages import PAGES, shell_commands
from PIL import Image
import pytest

from declip_jax.image_search import server as server_lib
from declip_jax.image_search.server import SearchServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
  return gallery.make_searcher(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def port(searcher):
  with gallery.serving(searcher) as server:
    yield server.server_address[1]


@pytest.fixture
def requests(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import search_requests

  return search_requests


def ask(port, target, body=None, headers=None, method=None):
  """Status, headers and content of an answer, parsed if it is JSON."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request(method or ("POST" if body else "GET"), target, body, headers or {})
  answer = connection.getresponse()
  content = answer.read()
  connection.close()
  is_json = answer.headers["Content-Type"] == "application/json"
  return answer.status, answer.headers, json.loads(content) if is_json else content


def search(port, body=None, **parameters):
  status, _, found = ask(port, f"/api/search?{urlencode(parameters, doseq=True)}", body)
  assert status == 200, found
  return found


def test_results_equal_a_direct_computation(searcher, port):
  clip, source = gallery.model(), searcher.source
  readable = [number for number in range(COUNT) if number != BROKEN]
  image = clip.encode_image([source[number]["image"] for number in readable])
  words, own = ["a", "b " * 20], encoded(77)  # a short text and a long one
  texts, minus, like, unlike = clip.encode_text(words), clip.encode_text("c"), image[0], image[3]
  direction = texts.sum(axis=0) - minus[0] + like - unlike + clip.encode_image(own)[0]
  cosine = image @ (direction / np.linalg.norm(direction))
  order = np.argsort(-cosine, kind="stable")
  query = {"text": words, "minus": "c", "like": readable[0], "unlike": readable[3]}
  pages = [search(port, own, **query, offset=offset, limit=25) for offset in (0, 25, 50)]
  results = [result for page in pages for result in page["results"]]
  scores = [result["score"] for result in results]
  np.testing.assert_allclose(scores, cosine[order], atol=1e-5)
  assert scores == sorted(scores, reverse=True)
  assert sorted(result["number"] for result in results) == readable
  assert {page["total"] for page in pages} == {COUNT - 1}
  found = search(port, like=7, limit=1)["results"][0]
  assert (found["number"], found["image"], found["thumbnail"]) == (7, "/images/7", "/thumbnails/7")
  assert found["score"] == pytest.approx(1, abs=1e-6)


def test_the_requests_of_the_documentation_find_images(port):
  lines = [words for page in PAGES for words in shell_commands(page) if words[0] == "curl"]
  for words in lines:
    target = words[-1].removeprefix("http://localhost:8000")
    given = parse_qs(urlsplit(target).query)
    status, _, found = ask(port, target, encoded(77) if words[1:3] == ["--data-binary", "@photo.jpg"] else None)
    assert status == 200, found
    assert len(found["results"]) == int(given.get("limit", ["24"])[0])
  assert [len(words) for words in lines] == [2, 4]


def test_a_sample_is_found_by_its_number(searcher, port):
  status, headers, found = ask(port, "/api/samples/3")
  assert (status, found["captions"], found["class"]) == (200, [f"{CAPTION} 3"], None)
  assert found["id"].endswith("003.jpg")
  assert headers["X-Content-Type-Options"] == "nosniff"
  for number, kind in ((2, "image/png"), (3, "image/jpeg")):
    status, headers, content = ask(port, f"/images/{number}")
    assert (status, headers["Content-Type"]) == (200, kind)
    assert content == searcher.source[number]["image"]
    status, headers, content = ask(port, f"/thumbnails/{number}")
    assert (status, headers["Content-Type"], Image.open(io.BytesIO(content)).size) == (200, "image/jpeg", (60, 40))
  for number in (BROKEN, COUNT, 10**11):
    for route in ("images", "thumbnails", "api/samples"):
      status, _, found = ask(port, f"/{route}/{number}")
      assert (status, str(number) in found["error"]) == (404, True)


def test_the_page_needs_no_other_file_and_runs_no_other_script(port):
  status, headers, content = ask(port, "/")
  policy = headers["Content-Security-Policy"]
  assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
  assert "default-src 'none'" in policy
  assert "unsafe" not in policy
  assert b"http://" not in content
  assert b"https://" not in content
  assert b"innerHTML" not in content


@pytest.mark.parametrize(
  ("parameters", "named"),
  [
    ("", "0 terms"),
    ("text=+", "text"),
    (f"text={'a' * 1001}", "text"),
    ("text=%ff", "parameters"),
    ("&".join(["text=a"] * 9), "9 terms"),
    ("text=a&q=1", "'q'"),
    ("text=a&limit=0", "limit=0"),
    ("text=a&limit=101", "limit=101"),
    ("text=a&limit=1&limit=1", "limit"),
    ("text=a&offset=-1", "offset='-1'"),
    ("like=%EF%BC%91", "like='１'"),
    (f"like={COUNT}", f"image {COUNT}"),
    (f"like={BROKEN}", f"image {BROKEN}"),
    ("text=a&minus=a", "cancel"),
  ],
)
def test_bad_parameters_are_named(port, parameters, named):
  status, _, found = ask(port, f"/api/search?{parameters}")
  assert (status, named in found["error"]) == (400, True), found


@pytest.mark.parametrize(
  ("target", "body", "headers", "status"),
  [
    ("/", None, {"Host": "evil.example"}, 403),
    ("/images/0", None, {"Host": "127.0.0.1.evil.example"}, 403),
    ("/", None, {"Host": "LocalHost:9"}, 200),  # the end of a tunnel
    ("/", None, {"Sec-Fetch-Site": "cross-site"}, 200),  # a link to the page
    ("/images/0", None, {"Sec-Fetch-Site": "cross-site"}, 403),
    ("/images/0", None, {"Sec-Fetch-Site": "same-origin"}, 200),
    ("/api/search", b"x", {"Origin": "http://evil.example"}, 403),
    ("/api/search", b"x", {"Content-Length": "16777217"}, 413),
    ("/api/search", b"x", {"Content-Length": "0"}, 400),
    ("/api/search", b"x", {"Content-Length": "-1"}, 400),
    ("/api/search", None, {"Transfer-Encoding": "chunked", "method": "POST"}, 411),
    ("/api/search", b"not an image", {}, 400),
    ("/api/search", encoded(9)[:90], {}, 400),
    ("/images/0", b"x", {}, 405),
    ("/images/0", None, {"method": "DELETE"}, 501),
    ("/images/../secret.txt", None, {}, 404),
    ("/images/%2e%2e/secret.txt", None, {}, 404),
    ("/images/000.png", None, {}, 404),
    (f"/api/search?text={'a' * 9000}", None, {}, 414),
  ],
)
def test_requests_outside_the_limits_are_refused(port, target, body, headers, status):
  found = ask(port, target, body, dict(headers), method=headers.pop("method", None))
  assert found[0] == status
  assert status == 200 or list(found[2]) == ["error"]


def test_hostile_requests_get_errors_and_nothing_else(port, requests):
  rng, before = random.Random(1), search(port, text="a")
  for _ in range(300):
    request = requests.hostile(rng)
    answer = requests.send(port, request)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert SECRET.encode() not in answer, request
    assert b"root:" not in answer, request
    assert b"Set-Cookie" not in head, request
    if head.startswith(b"HTTP/1.0 "):
      status = int(head.split()[1])
      assert status < 500 or status in (501, 505), request  # methods and versions that there are not
      if b"Content-Type: application/json" in head and not request.startswith(b"HEAD"):
        assert ("error" in json.loads(content)) == (status != 200), request
  after = search(port, text="a")
  assert after["results"] == before["results"]


def test_a_request_that_takes_too_long_is_ended_however_slowly_it_arrives(port, monkeypatch):
  monkeypatch.setattr(server_lib, "_SECONDS", 0.4)
  start = time.monotonic()
  with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
    connection.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n")
    connection.settimeout(0.1)
    received = b""
    while b"error" not in received and time.monotonic() < start + 20:
      try:
        received += connection.recv(2**16)
      except TimeoutError:
        connection.sendall(b"x")  # each byte arrives in time
  assert received.startswith(b"HTTP/1.0 408 ")


def test_connections_beyond_the_limit_wait(searcher, monkeypatch):
  monkeypatch.setattr(server_lib, "_CONNECTIONS", 2)
  monkeypatch.setattr(server_lib, "_SECONDS", 1.0)
  with gallery.serving(searcher) as server:
    port = server.server_address[1]
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    start = time.monotonic()
    assert ask(port, "/api/samples/0")[0] == 200
    assert time.monotonic() - start > 0.5
    for connection in idle:
      connection.close()


def test_a_failure_is_told_without_its_reason(searcher, port, monkeypatch, caplog):
  monkeypatch.setattr(searcher, "sample", lambda number: [][number])
  status, _, found = ask(port, "/api/samples/1")
  assert status == 500
  assert "index" not in found["error"]
  assert "IndexError" in caplog.text


def test_a_port_in_use_is_named(port):
  with pytest.raises(ValueError, match=f"port {port} is in use"):
    SearchServer(port)
