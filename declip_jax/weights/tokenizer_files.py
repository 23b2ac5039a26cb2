"""Finds the tokenizer that lies beside weights, as the name that `data.text.tokenizer.make_tokenizer` takes."""

from collections.abc import Iterable, Mapping
import json
from pathlib import Path
from typing import Any

# In the order of preference: transformers reads SigLIP's SentencePiece model, and open_clip and SigLIP 2 the JSON.
_FILES = {
  "spiece.model": "sentencepiece",
  "tokenizer.json": "huggingface",
  "sentencepiece.bpe.model": "sentencepiece",
  "tokenizer.model": "sentencepiece",
}
# How open_clip cleans texts for a tokenizer of transformers, by the name in `tokenizer_kwargs.clean`.
OPEN_CLIP_STEPS = {
  "canonicalize": ("repair", "underscores", "lower", "no_punctuation", "spaces"),
  "lower": ("repair", "lower", "spaces"),
  "whitespace": ("repair", "spaces"),
}


def tokenizer_beside(folder: Path, **options: str | Iterable[str]) -> dict[str, Any]:
  """The setting `text.tokenizer` for the tokenizer in a folder; empty if the folder has none.

  Args:
    folder: folder of the weights.
    options: options of the tokenizer, such as `start="none"`; the padding is that of `tokenizer_config.json`.
  """
  file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
  if file is None:
    return {}
  padding = _padding(folder)
  given = ({"pad": padding} if padding else {}) | options
  values = {name: value if isinstance(value, str) else ",".join(value) for name, value in given.items()}
  query = "&".join(f"{name}={value}" for name, value in values.items())
  return {"text.tokenizer": f"{_FILES[file.name]}:{file.absolute()}{'?' if query else ''}{query}"}


def is_sentence_pieces(folder: Path) -> bool:
  """Whether `tokenizer_beside` finds SigLIP's SentencePiece model."""
  return (folder / "spiece.model").is_file()


def tokenizer_fields(folder: Path) -> Mapping[str, Any]:
  """The fields of `tokenizer_config.json`; empty if it is absent or damaged, as nothing depends on it alone."""
  try:
    fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return fields if isinstance(fields, dict) else {}


def _padding(folder: Path) -> str:
  token = tokenizer_fields(folder).get("pad_token")
  if isinstance(token, dict):
    token = token.get("content")
  return token if isinstance(token, str) and not set(token) & set("&,=") else ""
