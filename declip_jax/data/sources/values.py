"""Values of records as tables and data sets write them: captions, labels, and markers of missing values."""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from declip_jax.data.sources.base import BadSample
from declip_jax.data.storage.bounded import short
from declip_jax.data.text.cleaning import has_text

# What pandas, SQL, Python and spreadsheets write for a missing value.
MISSING = frozenset({"", "nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "\\N", "N/A", "n/a", "#N/A"})

_LARGEST_LABEL = 2**31 - 1  # batches store labels as int32
TEXT_KEYS = ("raw", "caption", "text", "sentence", "value", "comment", "title")  # of objects in a list of captions
_NUMBER = re.compile(r"[+-]?(\d++(\.\d*+)?|\.\d++)([eE][+-]?\d++)?")

_STRING = r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_ELEMENT = rf"(?:u?{_STRING}|None|null|nan)"
_LIST = re.compile(  # of JSON or Python, or of NumPy, which writes no commas; or a tuple
  rf"\[\s*+\]|\[\s*+{_ELEMENT}(?:\s*+,\s*+{_ELEMENT}|\s++u?{_STRING})*+\s*+,?\s*+\]"
  rf"|\(\s*+{_ELEMENT}\s*+,(?:\s*+{_ELEMENT}\s*+,)*+\s*+(?:{_ELEMENT}\s*+)?\)",
  re.DOTALL,
)
_STRINGS = re.compile(_STRING, re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "'": "'", '"': '"', "\\": "\\"}


def is_missing(value: Any) -> bool:
  """Whether a value marks a missing one: None, NaN, or a text such as "", "nan", "NULL" or "\\N"."""
  if isinstance(value, str):
    return value.strip() in MISSING
  return value is None or (isinstance(value, float) and value != value)


def captions_of(value: Any) -> list[str]:
  """Returns the captions in a value, stripped, without those that are missing or have no text.

  Args:
    value: a text; a list of texts, also written in a text as JSON, Python or NumPy write it; an object with its text
      under a key such as "raw" or "caption", or a list of these; a missing value.

  Raises:
    BadSample: the value is none of these.
  """
  if isinstance(value, str) and (text := value.strip())[:1] not in ("[", "("):  # nearly all values
    return [text] if text not in MISSING and has_text(text) else []
  if is_missing(value):
    return []
  if isinstance(value, Mapping):
    # A list of objects may be one of lists; captions in several languages have English ones.
    value = next((value[key] for key in (*TEXT_KEYS, "en") if key in value), value)
  listed = value if isinstance(value, list | tuple) else _elements(value) if isinstance(value, str) else [value]
  texts = [_text(one) for one in listed if not is_missing(one)]
  if any(text is None for text in texts):
    raise BadSample("damaged record", f"expected a caption or a list of captions, got {short(value)}")
  return [text.strip() for text in texts if text and not is_missing(text) and has_text(text)]


def label_of(value: Any, column: str) -> int | str | None:
  """Returns a label, a number, a name or None; pandas writes whole numbers as 3.0 if some are missing.

  Args:
    value: a whole number, also as a text, a negative number for no label, a name, or a missing value.
    column: the column, for messages.

  Raises:
    BadSample: the value is none of these, such as a fraction, or the number is larger than any class.
  """
  if is_missing(value):
    return None
  if isinstance(value, str):
    value = re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip())
    if re.fullmatch(r"-\d+", value):
      return None
    if value.isdecimal():
      if len(value.lstrip("0")) <= len(str(_LARGEST_LABEL)) and int(value) <= _LARGEST_LABEL:
        return value
    elif not _NUMBER.fullmatch(value):
      return value
  elif (isinstance(value, int) or (isinstance(value, float) and value.is_integer())) and value <= _LARGEST_LABEL:
    return max(int(value), -1)
  expected = "a whole number or a name for the label"
  if not isinstance(value, float) and str(value)[:20].isdecimal():
    expected = f"a label up to {_LARGEST_LABEL:,}"
  raise BadSample("damaged record", f"expected {expected} in {column!r}, got {short(value)}")


def presence_of(value: Any, column: str) -> int:
  """Returns the label of one of several classes: 1 if it is present, -1 if it is absent, 0 if it does not count.

  Args:
    value: 1 or 0, also as a text or truth value; -1 or a missing value does not count, as in CheXpert's tables.
    column: the column, for messages.

  Raises:
    BadSample: the value is none of these.
  """
  if is_missing(value):
    return 0
  text = str(int(value) if isinstance(value, bool | np.bool_) else value).strip()
  known = {"1": 1, "0": -1, "-1": 0}.get(re.sub(r"\.0+$", "", text))
  if known is None:
    raise BadSample("damaged record", f"expected 1, 0 or -1 in {column!r}, got {short(value)}")
  return known


def _text(value: Any) -> str | None:
  """A text, or the text in an object; None if there is none."""
  if isinstance(value, Mapping):
    value = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
  return value if isinstance(value, str) else None


def _elements(text: str) -> list[str]:
  """The elements of a list in a text; the text itself if it is not a list."""
  if text.lstrip()[:1] not in ("[", "(") or not _LIST.fullmatch(text.strip()):
    return [text]
  strings = [_ESCAPE.sub(_unescaped, string[1:-1]) for string in _STRINGS.findall(text)]
  # JSON writes a character outside of the basic plane as two surrogates.
  return [string.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for string in strings]


def _unescaped(escape: re.Match[str]) -> str:
  code = escape[1]
  return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPED.get(code, f"\\{code}")
