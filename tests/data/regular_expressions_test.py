"""Every regular expression that sees text from files takes linear time: Python runs no other thread meanwhile."""

import ast
from collections import deque
from collections.abc import Iterator
import contextlib
import gc
import importlib
import itertools
from pathlib import Path
import re
import signal
import sys
import time

import pytest

import declip_jax

ROOT = Path(declip_jax.__file__).parent
LENGTH = 4000
SECONDS = 0.03  # of one thread; linear time takes about 1 ms, quadratic time 0.1 s
METHODS = ("match", "fullmatch", "search", "sub", "split", "findall", "finditer")
STARTS = ("", "a", "&#", "['", "(u'", "a:", "1 k=")
PIECES = (
  "a",
  "1",
  "0",
  " ",
  "\t",
  "-",
  "_",
  ".",
  ",",
  ":",
  "=",
  "#",
  "&",
  "?",
  "+",
  "/",
  "\\",
  "'",
  '"',
  "[",
  "A",
  "é",
)
PIECES += ("a1", "1 ", "a ", "a.", "1.", ".0", "a:", "a::", "?a", "?a=", "&a", "&#0", "&amp;", "amp;", "'a',", "'a' ")
PIECES += ("\\x", "\\'", "a+", "+a", "[a]", "#1", "-1", "-12345", "..1", "<|", "a/", "module.", "k=")
ENDS = ("!", "a")
# It sees only texts that are lists, which `_LIST` has matched: there each quote begins or ends a string.
NOT_ALONE = {"_STRINGS"}


def expressions() -> Iterator[tuple[str, re.Pattern, str]]:
  """The place, the pattern and the method of each use; patterns that are made at run time are left out."""
  paths = [path for folder in ("data", "weights") for path in sorted((ROOT / folder).rglob("*.py"))]
  for path in [*paths, ROOT / "evals" / "classes.py"]:
    module = importlib.import_module(".".join(["declip_jax", *path.relative_to(ROOT).with_suffix("").parts]))
    compiled = {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}
    for node in ast.walk(ast.parse(path.read_text())):
      place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
      match node:
        case ast.Attribute(value=ast.Name(id=name), attr=method) if method in METHODS and name in compiled:
          if name not in NOT_ALONE:
            yield place, compiled[name], method
        case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=method), args=[ast.Constant(value=text), *_]):
          if method in METHODS:
            yield place, re.compile(text, re.DOTALL if "DOTALL" in ast.unparse(node) else re.NOFLAG), method


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
  """Stops what takes exponential time."""

  def stop(*_: object) -> None:
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def seconds(pattern: re.Pattern, method: str, text: str) -> float:
  subject = text if isinstance(pattern.pattern, str) else text.encode()
  arguments = (subject[:0], subject) if method == "sub" else (subject,)
  start = time.thread_time()
  found = getattr(pattern, method)(*arguments)
  if method == "finditer":
    deque(found, maxlen=0)
  return time.thread_time() - start


def slow_texts(pattern: re.Pattern, method: str) -> list[str]:
  """Texts that take more than linear time, as Python writes them."""
  slow = []
  for start, piece, end in itertools.product(STARTS, PIECES, ENDS):
    text = start + piece * (LENGTH // len(piece)) + end
    try:
      with stopped_after(5):
        if seconds(pattern, method, text) > SECONDS and min(seconds(pattern, method, text) for _ in range(2)) > SECONDS:
          slow.append(f"{start!r} + {piece!r} * n + {end!r}")
    except TimeoutError:
      return [*slow, f"{start!r} + {piece!r} * n + {end!r}"]
  return slow


@pytest.mark.slow
def test_no_text_takes_more_than_linear_time():
  found = list(expressions())
  assert len(found) > 40
  gc.disable()
  try:
    slow = {place: texts[:3] for place, pattern, method in found if (texts := slow_texts(pattern, method))}
  finally:
    gc.enable()
  assert slow == {}


def test_quadratic_time_is_found(monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "PIECES", (" ", "a"))
  monkeypatch.setattr(sys.modules[__name__], "STARTS", ("",))
  assert any("' '" in text for text in slow_texts(re.compile(r"\s+$"), "search"))
  assert slow_texts(re.compile(r"\s++"), "search") == []
