"""What a request asks for: its parameters, with limits, and the errors that answer bad ones."""

from collections.abc import Mapping
from email.message import Message
from http import HTTPStatus
import re
from typing import NamedTuple
from urllib.parse import parse_qsl

from declip_jax.image_search.searcher import Query

MAX_TARGET = 8192  # bytes of a path and its parameters
MAX_BODY = 16 * 2**20  # bytes of an image
_MAX_TERMS, _MAX_TEXT = 8, 1000  # of a query; characters of a text
_MAX_LIMIT, _LIMIT = 100, 24  # images on a page, and the default
_NAMES = ("text", "minus", "like", "unlike", "offset", "limit")
_NUMBER = re.compile("[0-9]{1,12}")
_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


class RequestError(ValueError):
  """A request that is answered by an error.

  Attributes:
    status: the status of the answer.
  """

  def __init__(self, status: HTTPStatus, message: str):
    super().__init__(message)
    self.status = status


class SearchRequest(NamedTuple):
  """A query and the page of its results that is asked for; see `ImageIndex.search`."""

  query: Query
  offset: int
  limit: int


def check_headers(headers: Message, *, is_page: bool) -> None:
  """Rejects requests that web sites other than the page itself make through a browser.

  A site whose name is made to resolve to 127.0.0.1 (DNS rebinding) has its name in `Host`; a site that refers to an
  address here has `Sec-Fetch-Site`, and `Origin` if it posts. Links to the page itself are allowed.

  Args:
    headers: those of the request.
    is_page: whether the request is for the page.

  Raises:
    RequestError: the message has the header.
  """
  hosts = headers.get_all("Host", [])
  if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
    raise RequestError(HTTPStatus.FORBIDDEN, f"Host {', '.join(hosts)!r:.200}: expected localhost or 127.0.0.1")
  for origin in headers.get_all("Origin", []):
    if origin.lower() != f"http://{hosts[0].lower()}":
      raise RequestError(HTTPStatus.FORBIDDEN, f"Origin {origin!r:.200}: expected http://{hosts[0]}")
  for site in headers.get_all("Sec-Fetch-Site", []):
    if not is_page and site not in ("same-origin", "none"):
      raise RequestError(HTTPStatus.FORBIDDEN, f"Sec-Fetch-Site {site!r:.200}: expected same-origin or none")


def body_size(headers: Message) -> int:
  """Size of the body of a request.

  Raises:
    RequestError: it is unknown, 0 or too large.
  """
  sizes = headers.get_all("Content-Length", [])
  if len(sizes) != 1 or "Transfer-Encoding" in headers:
    raise RequestError(HTTPStatus.LENGTH_REQUIRED, "expected one Content-Length, and no Transfer-Encoding")
  if not (size := _number("Content-Length", sizes[0])):
    raise RequestError(HTTPStatus.BAD_REQUEST, "the body is empty: expected an image")
  if size > MAX_BODY:
    raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{size} bytes: expected at most {MAX_BODY}")
  return size


def parse_search(parameters: str, image: bytes | None = None) -> SearchRequest:
  """Parses the parameters of a search.

  Args:
    parameters: what follows the ? of the address; `text`, `minus`, `like` and `unlike` may be repeated.
    image: an encoded image to add to the query.

  Raises:
    RequestError: the message names the parameter and the legal values.
  """
  found = _parameters(parameters)
  terms = sum(len(found[name]) for name in ("text", "minus", "like", "unlike")) + (image is not None)
  if not 1 <= terms <= _MAX_TERMS:
    raise _bad(f"{terms} terms: expected 1 to {_MAX_TERMS} of text, minus, like, unlike or an image")
  for name in ("text", "minus"):
    for text in found[name]:
      if not text.strip() or len(text) > _MAX_TEXT:
        raise _bad(f"{name}={text!r:.80}: expected a text of 1 to {_MAX_TEXT} characters")
  numbers = {name: tuple(_number(name, value) for value in found[name]) for name in ("like", "unlike")}
  query = Query(tuple(found["text"]), tuple(found["minus"]), numbers["like"], numbers["unlike"], image)
  limit = _single(found, "limit", _LIMIT)
  if not 1 <= limit <= _MAX_LIMIT:
    raise _bad(f"limit={limit}: expected 1 to {_MAX_LIMIT}")
  return SearchRequest(query, _single(found, "offset", 0), limit)


def _parameters(text: str) -> dict[str, list[str]]:
  found: dict[str, list[str]] = {name: [] for name in _NAMES}
  try:
    pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MAX_TERMS + len(_NAMES))
  except ValueError as error:
    raise _bad(f"the parameters are not valid: {error}") from error
  for name, value in pairs:
    if name not in found:
      raise _bad(f"parameter {name!r:.80}: expected one of {', '.join(_NAMES)}")
    found[name].append(value)
  return found


def _single(found: Mapping[str, list[str]], name: str, default: int) -> int:
  if len(found[name]) > 1:
    raise _bad(f"{name} is given {len(found[name])} times: expected once")
  return _number(name, found[name][0]) if found[name] else default


def _number(name: str, text: str) -> int:
  if not _NUMBER.fullmatch(text):
    raise _bad(f"{name}={text!r:.80}: expected a whole number of at most 12 digits")
  return int(text)


def _bad(message: str) -> RequestError:
  return RequestError(HTTPStatus.BAD_REQUEST, message)
