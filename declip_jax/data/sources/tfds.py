"""Data sets prepared by TensorFlow Datasets as ArrayRecord, read without TensorFlow."""

from collections.abc import Iterator, Mapping
from functools import cached_property
import os
import re
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from declip_jax.data.sources.base import Example

# Features are named by their path, "captions/text" for a text within a sequence. Names that count, in any part of it:
_CAPTION_NAMES = {"caption", "captions", "text", "texts", "title", "sentence", "sentences", "alt_text", "description"}
_ROLES = ("image", "caption", "label")
# NAME or NAME:VERSION or a folder, then a split such as train[10%:60%]+test, whose slice may hold a colon of its own.
_LOCATION = re.compile(r"(?P<where>.+?):(?P<split>[A-Za-z][\w-]*(\[[^]]*\])?(\+[A-Za-z][\w-]*(\[[^]]*\])?)*)")


class _Fields(NamedTuple):
  """Paths of the features that play a part; None for none."""

  image: str
  caption: str | None
  label: str | None


class Tfds:
  """A split of a prepared data set as a `Source`; make it with `open_tfds`."""

  skipped: dict[str, int] = {}  # noqa: RUF012  every record is complete by construction

  def __init__(self, location: str, where: str, split: str, fields: _Fields):
    self.name = f"tfds:{location}"
    self._where, self._split, self._fields = where, split, fields
