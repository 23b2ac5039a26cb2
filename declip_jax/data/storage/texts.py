"""Texts in files: their encoding and their lines."""

import codecs
import re

from absl import logging

# UTF-32's mark begins with UTF-16's, so it comes first.
_MARKS = (
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
START = 64  # bytes from which the encoding is recognised


def encoding_of(start: bytes) -> str:
  """The encoding of a text, from its first bytes: that of its byte order mark, or UTF-16 without a mark, else UTF-8."""
  for mark, encoding in _MARKS:
    if start.startswith(mark):
      return encoding
  start = start[: len(start) // 2 * 2]
  for zeros, others, encoding in ((start[1::2], start[::2], "utf-16-le"), (start[::2], start[1::2], "utf-16-be")):
    if 2 * zeros.count(0) > len(zeros) > 1 and not others.count(0):  # as in western texts; UTF-8 has no zeros
      return encoding
  return "utf-8-sig"


def decode(data: bytes, place: str) -> str:
  """The text of a file, without its byte order mark.

  Bytes that are not valid UTF-8 are read as Windows-1252, unless other characters of the text are UTF-8; what is not
  valid there either becomes U+FFFD. The log names the first such file of a process.

  Args:
    data: the contents of the file.
    place: the file, for the log.
  """
  encoding = encoding_of(data[:START])
  try:
    return data.decode(encoding)
  except UnicodeDecodeError as error:
    name, used = encoding.removesuffix("-sig").upper(), "with U+FFFD for what is not"
    text = data.decode(encoding, "replace")
    if name == "UTF-8" and text.replace("\N{REPLACEMENT CHARACTER}", "").isascii() and (western := _western(data)):
      text, used = western, "as Windows-1252"
    message = "%s is not %s and was read %s; others may not be either: %s"
    logging.log_first_n(logging.WARNING, message, 1, place, name, used, error)
    return text


def lines(text: str) -> list[str]:
  r"""The lines of a text, stripped; they end with \n, \r\n or \r, unlike those of `str.splitlines`."""
  return [line.strip() for line in re.split(r"\r\n?|\n", text)]


def _western(data: bytes) -> str | None:
  try:
    return data.decode("cp1252")
  except UnicodeDecodeError:  # five of its bytes have no character
    return None
