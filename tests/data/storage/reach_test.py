import asyncio
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import os
import socket
import sys
import threading
from types import SimpleNamespace

import fsspec
import pytest

from declip_jax.data.sources import open_source
from declip_jax.data.sources.base import BadSample
from declip_jax.data.storage import files, remote
from declip_jax.data.storage.reach import NotAllowedError, Reach


@pytest.fixture
def root(tmp_path):
  """A folder with an image, and links and files around it."""
  for name in ("set/0.jpg", "set/in/1.jpg", "secret.jpg", "other/2.jpg"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(name.encode())
  (tmp_path / "set" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
  (tmp_path / "set" / "folder").symlink_to(tmp_path / "other")
  (tmp_path / "set" / "inside.jpg").symlink_to("in/1.jpg")
  (tmp_path / "linked").symlink_to(tmp_path / "set")
  return str(tmp_path / "set")


@pytest.mark.parametrize("path", ["0.jpg", "./in/../0.jpg", "in/1.jpg", "inside.jpg", "a b?*[.jpg", "x:/y.jpg"])
def test_paths_below_the_root_are_read(root, path):
  assert Reach().resolve(path, root) == os.path.normpath(f"{root}/{path}")
  assert Reach().resolve(f"{root}/0.jpg", root) == Reach().resolve(f"file://{root}/0.jpg", root) == f"{root}/0.jpg"


@pytest.mark.parametrize(
  "path", ["../secret.jpg", "in/../../secret.jpg", "{}/../secret.jpg", "link.jpg", "folder/2.jpg"]
)
def test_paths_that_lead_outside_the_root_must_be_allowed(root, path):
  path = path.format(root)
  for given in (path, *([f"file://{path}"] if path.startswith("/") else [])):
    with pytest.raises(NotAllowedError, match=r"allow=outside"):
      Reach().resolve(given, root)
    assert os.path.isfile(Reach.of({"allow": "outside"}).resolve(given, root))


def test_a_root_may_be_a_link(root):
  linked = f"{os.path.dirname(root)}/linked"
  assert Reach.of({"root": linked}).resolve("0.jpg", "/") == f"{linked}/0.jpg"
  assert Reach.of({"root": "/"}).resolve(f"{root}/link.jpg", root) == f"{root}/link.jpg"


@pytest.mark.parametrize(
  "url",
  ["https://a.example/x.jpg", "HTTPS://a.example/x.jpg", "gs://b/x", "simplecache::memory://b/x", "local:///etc/x"],
)
def test_urls_in_data_must_be_allowed(url, root, monkeypatch):
  monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: pytest.fail("a request"))
  with pytest.raises(NotAllowedError):
    Reach.of({"allow": "ftp,memory"}).resolve(url, root)


@pytest.mark.parametrize(
  "host",
  ["127.0.0.1", "localhost", "169.254.169.254", "10.1.2.3", "192.168.0.1", "0.0.0.0", "224.0.0.1", "2130706433"]
  + ["[::1]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]"]
  + ["[2002:7f00:1::]", "[ff02::1]", "[fe80::1]", "[fd00::1]", "[fec0::1]", "[2001:0:7f00:1::]", "[::ffff:0:7f00:1]"],
)
def test_private_addresses_must_be_allowed_separately(host, root):
  for url in (f"http://{host}:80/x.jpg", f"http://user@{host}/x.jpg", f"ftp://{host}/x.jpg"):
    with pytest.raises(NotAllowedError, match=r"private address.*allow=ftp,http,private"):
      Reach.of({"allow": "http,ftp"}).resolve(url, root)
    assert Reach.of({"allow": "http,ftp,private"}).resolve(url, root) == url


@pytest.mark.parametrize("host", ["93.184.216.34", "[2606:4700::1]", "[64:ff9b::5db8:d822]", "[2002:5db8:d822::1]"])
def test_public_addresses_are_allowed(host, root):
  assert Reach.of({"allow": "http"}).resolve(f"http://{host}/x.jpg", root) == f"http://{host}/x.jpg"


def test_a_name_may_lead_to_a_private_address(root, monkeypatch):
  addresses = {"public.example": ["93.184.216.34"], "mixed.example": ["93.184.216.34", "10.0.0.1"]}

  def getaddrinfo(host, *_):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses[host]]

  monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
  remote.is_private.cache_clear()
  reach = Reach.of({"allow": "https"})
  assert reach.resolve("https://public.example/x.jpg?a=1", root) == "https://public.example/x.jpg?a=1"
  with pytest.raises(NotAllowedError, match="private address"):
    reach.resolve("https://mixed.example/x.jpg", root)
  remote.is_private.cache_clear()


def test_the_web_client_of_a_public_server_connects_to_no_private_address(monkeypatch):
  fake = SimpleNamespace(TCPConnector=SimpleNamespace, ClientSession=SimpleNamespace)
  monkeypatch.setitem(sys.modules, "aiohttp", fake)
  monkeypatch.setattr(remote, "is_private", lambda host: host == "own.example")
  assert remote._web_options("http://own.example") == {}  # the user allowed a private server
  connect = asyncio.run(remote._web_options("https://u:p@public.example:1")["get_client"]()).connector.socket_factory
  kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
  with connect((*kind, ("93.184.216.34", 80))) as made:
    assert (made.family, made.type) == kind[:2]
  with pytest.raises(PermissionError, match="127.0.0.1"):
    connect((*kind, ("127.0.0.1", 80)))


@pytest.mark.parametrize("header", ["Location", "URI"])
def test_a_public_server_cannot_redirect_to_a_private_address(header, monkeypatch):
  pytest.importorskip("aiohttp")

  class Redirect(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      self.send_response(302)
      self.send_header(header, f"http://127.0.0.2:{self.server.server_address[1]}/secret")
      self.end_headers()

    def log_message(self, *_: object) -> None:
      pass

  monkeypatch.setattr(remote, "is_private", lambda _: False)
  monkeypatch.setattr(remote, "_is_public", lambda host: host == "127.0.0.1")
  remote._filesystem.cache_clear()
  with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      with pytest.raises(PermissionError, match=r"private address, 127\.0\.0\.2"):
        files.read(f"http://127.0.0.1:{server.server_address[1]}/a.jpg")
    finally:
      server.shutdown()
      remote._filesystem.cache_clear()


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "aiohttp", None)
  remote._filesystem.cache_clear()
  with pytest.raises(ValueError, match=r"https://a\.example: .*pip install .*\[https\]"):
    remote._filesystem("https://a.example")


def test_below_a_remote_root():
  reach = Reach.of({"root": "memory://bucket/data/"})
  assert reach.resolve("a/../x.jpg", "") == "memory://bucket/data/a/../x.jpg"
  assert reach.resolve("memory://bucket/data/x.jpg", "") == "memory://bucket/data/x.jpg"
  for path in (
    "../x.jpg",
    "a/../../x.jpg",
    "%2e%2e/x.jpg",
    "memory://bucket/data/../x.jpg",
    "memory://bucket/x",
    "/etc/x",
  ):
    with pytest.raises(NotAllowedError):
      reach.resolve(path, "")


def test_an_unknown_word_is_named():
  with pytest.raises(ValueError, match=r"allow=htps: expected outside, private, or a kind of URL"):
    Reach.of({"allow": "outside,htps"})


@pytest.mark.parametrize("kind", ["table", "coco"])
def test_what_is_not_allowed_is_a_bad_sample_and_none_other_an_error(root, kind):
  for number, names in enumerate((["0.jpg", "../secret.jpg", "memory://x/y.jpg", "link.jpg"], ["../secret.jpg"])):
    if kind == "table":
      path, text = f"{root}/{number}.csv", "\n".join(["image,caption", *(f"{name},x" for name in names)])
    else:
      images = ", ".join(f'{{"id": {n}, "file_name": "{name}"}}' for n, name in enumerate(names))
      notes = ", ".join(f'{{"image_id": {n}, "caption": "x"}}' for n in range(len(names)))
      path, text = f"{root}/{number}.json", f'{{"images": [{images}], "annotations": [{notes}]}}'
    with open(path, "w") as file:
      file.write(text)
    if number:
      with pytest.raises(FileNotFoundError, match=r"secret\.jpg"):
        open_source(f"{kind}:{path}?root={root}")
      continue
    source = open_source(f"{kind}:{path}")
    assert source[0]["image"] == b"set/0.jpg"
    for index in (1, 2, 3):
      with pytest.raises(BadSample, match="allow=") as error:
        source[index]
      assert error.value.kind == "not allowed"
    assert open_source(f"{kind}:{path}?allow=outside")[1]["image"] == b"secret.jpg"
