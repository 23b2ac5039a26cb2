"""Finds the tokenizers that lie beside weights, as names for `data.text.tokenizer.make_tokenizer`, and exports them."""

from collections.abc import Iterable, Mapping
import json
import os
from pathlib import Path
import shutil
from typing import Any

from declip_jax.data.text.tokenizer import Tokenizer, make_tokenizer, parse_name

# In the order of preference: transformers reads SigLIP's SentencePiece model, and open_clip and SigLIP 2 the JSON.
_FILES = {
  "spiece.model": "sentencepiece",
  "tokenizer.json": "huggingface",
  "tokenizer.model": "sentencepiece",
}
# Names of exported files by the kind of tokenizer.
_EXPORTED = {"huggingface": "tokenizer.json", "sentencepiece": "spiece.model"}
_LONGEST = 64  # characters of a token that marks the start or the padding of texts; a longer one is damaged
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
    options: options of the tokenizer, such as `start="none"`; by default, the padding and the start of texts are those
      of the files.
  """
  file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
  if file is None:
    return {}
  found = {"pad": padding_token(folder), "start": "" if "start" in options else _start_token(file)}
  given = {name: token for name, token in found.items() if token} | options
  values = {name: value if isinstance(value, str) else ",".join(value) for name, value in given.items()}
  query = "&".join(f"{name}={value}" for name, value in values.items())
  return {"text.tokenizer": f"{_FILES[file.name]}:{file.absolute()}{'?' if query else ''}{query}"}


def padding_token(folder: Path) -> str:
  """The padding by `tokenizer_config.json`, or else by `special_tokens_map.json`; "" if neither names it."""
  names = ("tokenizer_config.json", "special_tokens_map.json")
  return next((token for name in names if (token := _token(_read(folder / name).get("pad_token")))), "")


def _start_token(file: Path) -> str:
  """The token before a text, "none" if there is none; "" if the file of the tokenizer is damaged.

  A `tokenizer.json` has it in its `post_processor`; SentencePiece models have no start unless the config says so.
  """
  adds_start = tokenizer_fields(file.parent).get("add_bos_token")
  if _FILES[file.name] == "sentencepiece":
    return "" if adds_start is True else "none"
  content = _read(file)
  if not content:
    return ""
  return "none" if adds_start is False else _first_added(content.get("post_processor")) or "none"


def _first_added(processor: Any) -> str:
  """The token that a `post_processor` of Hugging Face's tokenizers adds before a text; "" if it adds none there."""
  match processor:
    case {"type": "Sequence", "processors": list() as parts}:
      return next((token for part in parts if (token := _first_added(part))), "")
    case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, *_]}:
      return _token(name)
    case {"type": "BertProcessing" | "RobertaProcessing", "cls": [name, *_]}:
      return _token(name)
  return ""


def is_sentence_pieces(folder: Path) -> bool:
  """Whether `tokenizer_beside` finds SigLIP's SentencePiece model."""
  return (folder / "spiece.model").is_file()


def tokenizer_fields(folder: Path) -> Mapping[str, Any]:
  """The fields of `tokenizer_config.json`; empty if it is absent or damaged, as nothing depends on it alone."""
  return _read(folder / "tokenizer_config.json")


def exported_files(name: str, context_length: int, **fields: Any) -> dict[str, bytes]:
  """The files of a tokenizer for transformers and open_clip, by their names in an export.

  Empty if the tokenizer has no file, or if the files would add another start or end to texts than our tokenizer does.

  Args:
    name: name of the tokenizer, see `make_tokenizer`.
    context_length: number of tokens of a text.
    fields: further fields of `tokenizer_config.json`.

  Raises:
    ValueError: see `make_tokenizer`.
  """
  kind, path, options = parse_name(name)
  if kind not in _EXPORTED or "end" in options or not os.path.isfile(path := os.path.expanduser(path)):
    return {}
  tokenizer, content = make_tokenizer(name, context_length), Path(path).read_bytes()
  if kind == "huggingface":
    if not (processor := _post_processor(tokenizer)):
      return {}
    changed = {"post_processor": processor, "padding": None, "truncation": None}
    content = json.dumps(json.loads(content) | changed, ensure_ascii=False).encode()
  about = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": context_length,
    "padding_side": "right",
    "eos_token": tokenizer.encoder.token(tokenizer.eot),
    "pad_token": tokenizer.encoder.token(tokenizer.pad),
  }
  described = json.dumps(about | fields, indent=2, ensure_ascii=False) + "\n"
  return {_EXPORTED[kind]: content, "tokenizer_config.json": described.encode()}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
  """What makes Hugging Face's tokenizers add our start and end; empty if the start is not a token of their file."""
  if max(tokenizer.starts, default=0) >= tokenizer.encoder.size:
    return {}
  tokens = {index: tokenizer.encoder.token(index) for index in (*tokenizer.starts, tokenizer.eot)}
  start = [{"SpecialToken": {"id": tokens[index], "type_id": 0}} for index in tokenizer.starts]
  first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
  end = {"SpecialToken": {"id": tokens[tokenizer.eot], "type_id": 0}}
  return {
    "type": "TemplateProcessing",
    "single": [*start, first, end],
    "pair": [*start, first, end, second, end],
    "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for index, token in tokens.items()},
  }


def copy_tokenizer(name: str, folder: Path) -> str:
  """Copies the file of a tokenizer into a folder; returns the name of the tokenizer there, unchanged without a file."""
  kind, file, _ = parse_name(name)
  if kind not in _EXPORTED or not os.path.isfile(file := os.path.expanduser(file)):
    return name
  shutil.copyfile(file, folder / _EXPORTED[kind])
  return _with_file(name, _EXPORTED[kind])


def resolve_tokenizer(name: str, folder: Path) -> str:
  """The name of a tokenizer of an export in `folder`, with the path of the file if that is in it."""
  file = folder / parse_name(name)[1]
  return _with_file(name, str(file.absolute())) if os.path.isfile(file) else name


def _with_file(name: str, file: str) -> str:
  """The name of a tokenizer with another file."""
  kind, old, _ = parse_name(name)
  return f"{kind}:{file}{name.removeprefix(f'{kind}:{old}')}"


def _read(file: Path) -> Mapping[str, Any]:
  """The object in a JSON file; empty if it is absent or damaged."""
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return fields if isinstance(fields, dict) else {}


def _token(token: Any) -> str:
  """A token of a config, which may have other fields than its content; "" if an option cannot name it."""
  if isinstance(token, dict):
    token = token.get("content")
  usable = isinstance(token, str) and len(token) <= _LONGEST and not set(token) & set("&,=")
  return token if usable else ""
