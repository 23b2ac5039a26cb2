"""Readers of lines and JSON, and descriptions of values, that need little memory for any file."""

from collections.abc import Callable
import io
import json
import re
import reprlib
from typing import Any

LONGEST = 2**19  # characters of a record, or of all captions of a sample: some hundreds of them are in memory
_SKIPPED = 2**20  # characters of a line that are skipped at once
_SHOWN = 80  # characters
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, _SHOWN, _SHOWN, _SHOWN
JSON_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)  # what delimits strings, objects and lists, and escapes
_DEEPEST = 100  # levels of objects and lists; Python's decoder allows some hundreds
_MOST_DIGITS = 4000  # digits of a whole number in JSON; Python rejects more than 4300, which would take long


class Lines(io.TextIOWrapper):
  """A text file whose `readline` and iteration return at most `longest + 1` characters of a line and skip the rest.

  A line is whole if it has at most `longest` characters.

  Args:
    stream: the file.
    encoding: its encoding.
    longest: the largest number of characters of a whole line.
    errors: what to do about invalid bytes, as in `open`.

  Raises:
    LookupError: the encoding is unknown.
  """

  def __init__(self, stream: Any, encoding: str, longest: int, errors: str = "strict"):
    super().__init__(
      stream, encoding, errors, newline="\n"
    )  # a lone \r can occur within captions, and \r\n is stripped
    self.longest = longest
    self._CHUNK_SIZE = 2**16  # bytes to decode at once; by default 8 KiB, which takes longer

  def readline(self, size: int | None = -1, /) -> str:
    if size is not None and size >= 0:
      return super().readline(size)
    line = rest = super().readline(self.longest + 1)
    while len(line) > self.longest and rest and not rest.endswith("\n"):
      rest = super().readline(_SKIPPED)
    return line

  def __next__(self) -> str:
    if line := self.readline():
      return line
    raise StopIteration


Fields = Callable[[list[tuple[str, Any]]], Any]  # makes an object from its names and values


def json_decoder(fields: Fields = dict) -> json.JSONDecoder:
  """A decoder for which whole numbers of thousands of digits are infinite, rather than an error."""
  return json.JSONDecoder(parse_int=_whole, object_pairs_hook=None if fields is dict else fields)


class NestedTooDeeplyError(ValueError):
  """JSON is nested too deeply to be parsed."""


def parse_json(text: str, fields: Fields = dict) -> Any:
  """Parses JSON; see `json_decoder`.

  Raises:
    ValueError: not JSON.
    NestedTooDeeplyError: nested too deeply; a ValueError, too.
  """
  try:
    return json_decoder(fields).decode(text)
  except RecursionError:
    raise NestedTooDeeplyError("nested too deeply") from None


def without_deep_values(text: str) -> tuple[str, int]:
  """Replaces the values in JSON that are nested too deeply to be parsed by null; returns the text and their number.

  Raises:
    ValueError: such a value does not end.
  """
  depth, quoted, kept, stop, count = 0, False, [], 0, 0
  for mark in JSON_MARKS.finditer(text):
    if mark[0] == '"':
      quoted = not quoted
    elif not quoted and mark[0] in "[{":
      depth += 1
      if depth == _DEEPEST:
        kept.append(text[stop : mark.start()])
        count += 1
    elif not quoted and mark[0] in "]}":
      if depth == _DEEPEST:
        stop = mark.end()
      depth -= 1
  if depth >= _DEEPEST:
    raise ValueError("nested too deeply, without an end")
  return "null".join([*kept, text[stop:]]), count


def _whole(digits: str) -> int | float:
  return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def short(value: Any) -> str:
  """The representation of any value for a message, about 80 characters at most."""
  try:
    text = repr(value[:_SHOWN]) if isinstance(value, str | bytes) else _REPR.repr(value)
  except (ValueError, RecursionError):  # a number of thousands of digits
    text = f"a huge {type(value).__name__}"
  return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
