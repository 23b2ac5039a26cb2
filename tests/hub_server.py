"""A server on loopback with those endpoints of the Hugging Face hub that huggingface_hub calls for models.

Paths, headers and codes of errors are those of https://huggingface.co/docs/hub/api and of huggingface_hub's client.
"""

import base64
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, field
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import re
import threading
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Model:
  """A repository with one commit.

  Attributes:
    files: contents by their names.
    refs: other branches and tags of the commit than main.
    gated: whether nobody may read it.
    visibility: as it was created.
  """

  files: dict[str, bytes] = field(default_factory=dict)
  refs: tuple[str, ...] = ()
  gated: bool = False
  visibility: str = "public"

  @property
  def commit(self) -> str:
    content = b"".join(name.encode() + self.files[name] for name in sorted(self.files))
    return hashlib.sha1(content).hexdigest()


class HubServer:
  """Models by their names, and what was asked for.

  Attributes:
    models: all models.
    downloads: names of the files that were sent.
    token: if it is set, changes need it.
    fails: whether every request is answered by status 503.
    cuts: whether the connection is closed before the contents of a file are sent.
  """

  def __init__(self) -> None:
    self.models: dict[str, Model] = {}
    self.downloads: list[str] = []
    self.token, self.fails, self.cuts = "", False, False
    handler = type("Handler", (_Handler,), {"hub": self})
    self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"

  @contextlib.contextmanager
  def running(self) -> Iterator["HubServer"]:
    thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
      yield self
    finally:
      self._server.shutdown()
      self._server.server_close()
      thread.join()


class _Handler(BaseHTTPRequestHandler):
  hub: HubServer
  protocol_version = "HTTP/1.1"

  def log_message(self, format: str, *args: Any) -> None:
    pass

  def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
    self.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _json(self, content: Any, status: int = 200, **headers: str) -> None:
    self._send(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

  def _model(self, name: str, revision: str | None = None) -> Model | None:
    """A model; sends the error, and returns None, if it cannot be read."""
    model = self.hub.models.get(name)
    if self.hub.fails:
      self._send(503)
    elif model is None:
      self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
    elif model.gated:
      self._json({"error": "Access is restricted"}, 403, X_Error_Code="GatedRepo")
    elif revision not in (None, "main", model.commit, *model.refs):
      self._json({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
    else:
      return model
    return None

  def do_GET(self) -> None:
    path = unquote(urlsplit(self.path).path)
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
      if model := self._model(*found.groups()):
        entries = [{"type": "file", "path": name, "size": len(x), "oid": _oid(x)} for name, x in model.files.items()]
        self._json(entries)
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
      if model := self._model(found[1]):
        refs = {
          "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": model.commit}],
          "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": model.commit} for name in model.refs],
          "converts": [],
        }
        self._json(refs)
    elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
      self._resolve(*found.groups())
    else:
      self._send(404)

  do_HEAD = do_GET

  def _resolve(self, name: str, revision: str, file: str) -> None:
    if not (model := self._model(name, revision)):
      return
    if file not in model.files:
      self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=model.commit)
      return
    if self.command == "GET":
      self.hub.downloads.append(file)
    content = model.files[file]
    if self.hub.cuts and self.command == "GET":
      self.command, self.close_connection = "HEAD", True
    self._send(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=model.commit)

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    path = unquote(urlsplit(self.path).path)
    if self.hub.fails:
      self._send(503)
    elif path == "/api/validate-yaml":
      self._json({"errors": [], "warnings": []})
    elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
      self._json({"error": "Invalid username or password."}, 401)
    elif path == "/api/repos/create":
      self._create(json.loads(body))
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
      if self._model(found[1]):
        files = [file["path"] for file in json.loads(body)["files"]]
        self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]})
    elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
      if model := self._model(found[1]):
        for line in map(json.loads, body.splitlines()):
          if line["key"] == "file":
            model.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{found[1]}/commit/{model.commit}"
        self._json({"commitUrl": url, "commitOid": model.commit, "success": True})
    else:
      self._send(404)

  def _create(self, fields: dict[str, Any]) -> None:
    name = f"{fields['organization']}/{fields['name']}"
    if name in self.hub.models:
      self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
      return
    private = fields.get("visibility") == "private" or fields.get("private")
    self.hub.models[name] = Model(visibility="private" if private else "public")
    self._json({"url": f"{self.hub.url}/{name}", "name": name})


def _oid(content: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
