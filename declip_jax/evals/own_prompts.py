"""Prompts of the user's own for a data set of the catalogue, from a file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
import json
import os
from pathlib import Path
from typing import Any

from declip_jax.evals.catalogue import BARE, DataSet
from declip_jax.evals.classes import align

NAME = "own"
_FORMS = "a list of templates with {}, or an object with a list of prompts for each class"


def read_prompts(path: str | os.PathLike[str], data: DataSet) -> DataSet:
  """Returns the data set with the prompt set `NAME` from a file, which is then its default.

  | file | contents |
  |---|---|
  | .txt | a template per line, with `{}` or `{c}` for the name of a class |
  | .json | a list of templates |
  | .json | an object of class to list of complete prompts, as those of CuPL (Pratt et al. 2023) |
  | .json | an object of data set to one of these, as CLIP_benchmark's `--custom_template_file` |

  Classes are matched by name, see `classes.align`.

  Raises:
    OSError: the file cannot be read.
    ValueError: it has another form, lacks the data set or names other classes; the message names the file.
  """
  place, text = os.fspath(path), Path(path).read_text("utf-8")
  if not place.endswith(".json"):
    return _with_templates(data, [line.strip() for line in text.splitlines() if line.strip()], place)
  try:
    found = json.loads(text)
  except ValueError as error:
    raise ValueError(f"{place}: not JSON: {error}") from None
  if isinstance(found, dict):
    found = next((found[name] for name in (data.key, data.clip_benchmark) if name in found), found)
  if isinstance(found, list):
    return _with_templates(data, found, place)
  if not isinstance(found, dict) or not all(map(_is_texts, found.values())):
    raise ValueError(f"{place}: expected {_FORMS}, for {data.key}")
  return _with_prompts(data, found, place)


def _with_templates(data: DataSet, templates: Sequence[Any], place: str) -> DataSet:
  if not _is_texts(templates):
    raise ValueError(f"{place}: expected {_FORMS}, for {data.key}")
  plain = tuple(template.replace("{c}", "{}") for template in templates)
  if wrong := [template for template in plain if template.count("{}") != 1]:
    raise ValueError(f"{place}: template {wrong[0]!r}: expected one {{}} for the name of the class")
  names = {name: of for name, of in data.names.items() if name != NAME}
  return replace(data, templates={NAME: plain, **_others(data)}, names=names)


def _with_prompts(data: DataSet, prompts: Mapping[str, Sequence[str]], place: str) -> DataSet:
  classes = align(data, list(prompts), place)
  of = dict(zip(classes.tolist(), map(tuple, prompts.values()), strict=True))
  names = {**data.names, NAME: tuple(of[number] for number in range(len(data.classes)))}
  return replace(data, templates={NAME: BARE, **_others(data)}, names=names)


def _is_texts(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _others(data: DataSet) -> dict[str, tuple[str, ...]]:
  return {name: templates for name, templates in data.templates.items() if name != NAME}
