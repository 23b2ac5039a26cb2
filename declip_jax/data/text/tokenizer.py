"""From captions to token ids: OpenAI's cleaning and byte-pair encoding by default, or a user's tokenizer file.

Ids equal those of `clip.tokenize(..., truncate=True)` of openai/CLIP with two exceptions: literal special tokens are
dropped (see `OpenAI.encode`), and captions with U+0345 or unassigned code points may be split differently, because the
versions of the Unicode tables differ.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import json
import os
import re
from typing import Any, Protocol

import instant_clip_tokenizer
from jaxtyping import Bool, Int
import numpy as np

from declip_jax.data.text.cleaning import SHORT, STEPS, clean, clean_head, without_special
from declip_jax.extras import sentencepiece, tokenizers
from declip_jax.spelling import did_you_mean

ORDINARY_IDS = 49406  # OpenAI's: 256 bytes, 256 bytes that end a word, 48,894 merges
# What OpenAI's code encodes apart from its neighbours: letters, a digit, other characters. (It takes 's and the like
# together, and digits of other scripts apart, so this finds fewer than three times as many pieces.)
_PIECES = re.compile(r"[^\W\d_]+|\d|(?:[^\w\s]+|_+)+")
_LONG = 512  # characters of a piece that is not encoded as a whole
_LONGEST = 32  # characters of a token of OpenAI's, at most
_APART = {
  True: "\N{CYRILLIC LETTER MULTIOCULAR O}",
  False: "\N{TIRONIAN SIGN CAPITAL ET}",
}  # no token joins them to others
# Names of special tokens in other tokenizers' files, in order of preference.
_NAMES = {
  "sot": ("<|startoftext|>", "[CLS]", "<s>", "<bos>", "<|begin_of_text|>"),
  "eot": ("<|endoftext|>", "[SEP]", "</s>", "<eos>", "<|end_of_text|>"),
  "mask": ("[MASK]", "<mask>", "<|mask|>"),
  "pad": ("[PAD]", "<pad>", "<|pad|>"),
}


_ROLES = {"start": "sot", "end": "eot", "pad": "pad"}  # options of `make_tokenizer` and roles of `_NAMES`


class Encoder(Protocol):
  """From text to ids and back, without start, end and padding. Picklable; loads its files once per process.

  Attributes:
    size: upper limit of the ids.
    special: ids that do not represent text, ascending.
  """

  @property
  def size(self) -> int: ...

  @property
  def special(self) -> tuple[int, ...]: ...

  def encode(self, text: str) -> list[int]: ...

  def encode_head(self, text: str, count: int) -> list[int]:
    """Returns the first `count` ids of a text, or more, in bounded time."""
    ...

  def decode(self, ids: list[int]) -> str: ...

  def word_marks(self) -> tuple[Bool[np.ndarray, "size"], Bool[np.ndarray, "size"]]:
    """Returns which tokens mark the beginning and which the end of a word."""
    ...


@functools.cache
def _byte_pairs() -> instant_clip_tokenizer.Tokenizer:
  """Builds the encoder, once per process: this takes 60 ms, and it does not pickle."""
  return instant_clip_tokenizer.Tokenizer()


@dataclasses.dataclass(frozen=True)
class OpenAI:
  """OpenAI's byte-pair encoding after its cleaning (see `clean`); lower case."""

  size: int = ORDINARY_IDS
  special: tuple[int, ...] = ()

  def encode(self, text: str) -> list[int]:
    """Encodes a text without the literal strings `<|startoftext|>` and `<|endoftext|>`.

    OpenAI's tokenizer turns them into the special ids, so a caption can end in the middle. A literal `<|mask|>` is
    ordinary text, as in DeCLIP.
    """
    return _byte_pairs().encode(without_special(clean(text)))

  def encode_head(self, text: str, count: int) -> list[int]:
    return _byte_pairs().encode(self._head(text, count))

  def rows(self, texts: Sequence[str], context_length: int) -> Int[np.ndarray, "n t"]:
    """Returns rows with OpenAI's start and end and padding 0, in half the time of encoding text by text."""
    if not texts:
      return np.empty((0, context_length), np.int32)
    heads = [self._head(text, context_length - 2) for text in texts]
    return _byte_pairs().tokenize_batch(heads, context_length).astype(np.int32)

  def _head(self, text: str, count: int) -> str:
    """The beginning of a cleaned caption that has its first `count` ids; all of it unless it is long."""
    if len(text) <= SHORT:
      return without_special(clean(text))
    head = clean_head(text, lambda head: len(_byte_pairs().encode(_beginning(without_special(head), count))) >= count)
    return _beginning(without_special(head), count)

  def decode(self, ids: list[int]) -> str:
    return _byte_pairs().decode(ids)

  def word_marks(self) -> tuple[Bool[np.ndarray, "size"], Bool[np.ndarray, "size"]]:
    ends = np.array([_byte_pairs().decode([index]).endswith(" ") for index in range(self.size)])
    return np.zeros_like(ends), ends


def _beginning(text: str, count: int) -> str:
  """The beginning of a cleaned text that determines its first `count` ids, which depend on nothing after it."""
  for number, piece in enumerate(_PIECES.finditer(text)):
    if number == 3 * count + 3:
      return text[: piece.start()]
    if piece.end() - piece.start() > _LONG and (beginning := _beginning_within(text, piece, count)):
      return beginning
  return text


def _beginning_within(text: str, piece: re.Match[str], count: int) -> str | None:
  """`_beginning` of a text that ends within a very long piece; None if the ids within the piece are too few.

  Byte-pair encoding takes quadratic time for such a piece. The ids up to a boundary between two tokens do not depend on
  what follows, and one of any 32 places in a row is such a boundary: so the first ids are known once they are the same
  for a boundary at each of these places.
  """
  apart = _APART[piece.group()[0].isalnum()]
  size = 2 * _LONG
  while piece.start() + size < piece.end():
    stop = piece.start() + size
    heads = {_ids_before(text[:place], apart, count) for place in range(stop - _LONGEST + 1, stop + 1)}
    if len(heads) == 1 and None not in heads:
      return text[:stop] + apart
    size *= 2
  return None


def _ids_before(text: str, apart: str, count: int) -> tuple[int, ...] | None:
  """Returns the first `count` ids of a text that more text follows.

  None if the text has fewer ids, or if ids of the whole would span its end.
  """
  ids = _byte_pairs().encode(text + apart)
  for end in range(len(ids) - 1, len(ids) - 5, -1):
    decoded = _byte_pairs().decode(ids[:end])
    if decoded.replace(" ", "") == text.replace(" ", "") and not decoded.endswith(" "):
      return tuple(ids[:count]) if end >= count else None
  return None


@functools.lru_cache(maxsize=4)
def _tokenizer_json(path: str) -> Any:
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
  except ModuleNotFoundError as error:
    raise ValueError(f"{path}: {error}") from error
  except Exception as error:  # the library raises nothing more specific
    raise ValueError(f"{path} is not a tokenizer.json of Hugging Face: {error}") from error
  tokenizer.no_truncation()  # rows are truncated and padded by `Tokenizer`
  tokenizer.no_padding()
  return tokenizer


def _unknown_id(tokenizer: Any) -> int | None:
  """The id of what the vocabulary lacks, which represents text; Unigram models tell it only in their file."""
  if hasattr(tokenizer.model, "unk_token"):
    return tokenizer.token_to_id(tokenizer.model.unk_token or "")
  return json.loads(tokenizer.to_str())["model"].get("unk_id")


@dataclasses.dataclass(frozen=True)
class HuggingFace:
  """A `tokenizer.json` of Hugging Face's tokenizers: its own normalisation follows the `cleaning.STEPS` of `clean`."""

  path: str
  clean: tuple[str, ...] = ("spaces",)

  @property
  def size(self) -> int:
    return _tokenizer_json(self.path).get_vocab_size()

  @functools.cached_property
  def special(self) -> tuple[int, ...]:
    tokenizer = _tokenizer_json(self.path)
    added, unknown = tokenizer.get_added_tokens_decoder(), _unknown_id(tokenizer)
    return tuple(sorted(index for index, token in added.items() if token.special and index != unknown))

  def find(self, names: Sequence[str]) -> int | None:
    """The id of the first of these tokens that exists."""
    found = (_tokenizer_json(self.path).token_to_id(name) for name in names)
    return next((index for index in found if index is not None), None)

  def encode(self, text: str) -> list[int]:
    ids = _tokenizer_json(self.path).encode(_cleaned(text, self.clean), add_special_tokens=False).ids
    return [index for index in ids if index not in self.special]  # a caption may contain one literally

  def encode_head(self, text: str, count: int) -> list[int]:
    return self.encode(text)  # in linear time

  def decode(self, ids: list[int]) -> str:
    return _tokenizer_json(self.path).decode(ids)

  def token(self, index: int) -> str:
    """The token of an id."""
    return _tokenizer_json(self.path).id_to_token(index)

  def word_marks(self) -> tuple[Bool[np.ndarray, "size"], Bool[np.ndarray, "size"]]:
    return _marks([_tokenizer_json(self.path).id_to_token(index) or "" for index in range(self.size)])


@functools.lru_cache(maxsize=4)
def _sentence_pieces(path: str) -> Any:
  try:
    return sentencepiece.SentencePieceProcessor(model_file=path)
  except ModuleNotFoundError as error:
    raise ValueError(f"{path}: {error}") from error
  except (OSError, RuntimeError) as error:
    raise ValueError(f"{path} is not a SentencePiece model: {error}") from error


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece model: its own normalisation follows the `cleaning.STEPS` of `clean`."""

  path: str
  clean: tuple[str, ...] = ("spaces",)

  @property
  def size(self) -> int:
    return _sentence_pieces(self.path).get_piece_size()

  @functools.cached_property
  def special(self) -> tuple[int, ...]:
    pieces = _sentence_pieces(self.path)
    return tuple(i for i in range(self.size) if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i))

  def find(self, names: Sequence[str]) -> int | None:
    """The id of the first of these pieces that exists."""
    pieces = _sentence_pieces(self.path)
    return next(
      (pieces.piece_to_id(name) for name in names if pieces.id_to_piece(pieces.piece_to_id(name)) == name), None
    )

  def encode(self, text: str) -> list[int]:
    return _sentence_pieces(self.path).encode(_cleaned(text, self.clean))

  def encode_head(self, text: str, count: int) -> list[int]:
    return self.encode(text)  # in linear time

  def decode(self, ids: list[int]) -> str:
    return _sentence_pieces(self.path).decode(ids)

  def token(self, index: int) -> str:
    """The token of an id."""
    return _sentence_pieces(self.path).id_to_piece(index)

  def word_marks(self) -> tuple[Bool[np.ndarray, "size"], Bool[np.ndarray, "size"]]:
    return _marks([_sentence_pieces(self.path).id_to_piece(index) for index in range(self.size)])


def _cleaned(text: str, steps: Iterable[str]) -> str:
  """Cleans a text after removing what cannot be encoded: halves of surrogate pairs."""
  text = text.encode("utf-8", "ignore").decode("utf-8")
  return functools.reduce(lambda cleaned, step: STEPS[step](cleaned), steps, text)


def _marks(tokens: Sequence[str]) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
  """Returns which tokens begin and which end a word, according to the spelling of the vocabulary.

  CLIP's words end with "</w>"; those of SentencePiece and GPT-2 begin with a mark for the space; BERT marks tokens that
  continue a word.
  """
  no = np.zeros(len(tokens), bool)
  ends = np.array([token.endswith("</w>") for token in tokens])
  if ends.any():
    return no, ends
  begins = np.array(
    [token.startswith(("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")) for token in tokens]
  )
  return (begins if begins.any() else np.array([not token.startswith("##") for token in tokens])), no


@functools.lru_cache(maxsize=4)
def _word_marks(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
  return encoder.word_marks()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Encodes captions as rows of ids; picklable and cheap to create.

  The special ids are plain fields. The defaults are OpenAI's, followed by the mask token of masked language modelling,
  so that OpenAI's ids and weights fit unchanged. DeCLIP's released models insert the mask before the other two,
  `Tokenizer(mask=49406, sot=49407, eot=49408)`; `weights.dialects` reorders their rows.

  Attributes:
    context_length: `t`, number of tokens of an encoded row, with start and end of text.
    sot: id of the start of text; None if texts have none, as SigLIP's.
    eot: id of the end of text.
    mask: id of the mask.
    pad: id of the padding; 0 as in OpenAI's code, which is also the id of a `!` inside a word.
    encoder: encoder of the text between start and end.
  """

  context_length: int = 77
  sot: int | None = 49406
  eot: int = 49407
  mask: int = 49408
  pad: int = 0
  encoder: Encoder = OpenAI()

  def __post_init__(self) -> None:
    if self.context_length < 2:
      raise ValueError(f"context_length={self.context_length}: at least 2, for start and end of text")

  @property
  def vocab_size(self) -> int:
    """Number of ids, including the special ones."""
    return max(self.plain_size, self.mask + 1)

  @property
  def plain_size(self) -> int:
    """Number of ids that texts without masked tokens need."""
    return max(self.encoder.size, *(index + 1 for index in (*self.starts, self.eot)))

  @property
  def starts(self) -> tuple[int, ...]:
    """The ids before those of a text: the start of text, if there is one."""
    return () if self.sot is None else (self.sot,)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a caption, cleaned but not truncated, without start and end of text."""
    return self.encoder.encode(text)

  def pad_ids(self, ids: Sequence[int]) -> np.ndarray:
    """Returns ids of `encode` as a row int32 `[t]`: start of text, as many ids as fit, end of text, padding."""
    whole = [*self.starts, *ids[: self._most], self.eot]
    row = np.full(self.context_length, self.pad, np.int32)
    row[: len(whole)] = whole
    return row

  @property
  def _most(self) -> int:
    """Largest number of ids of a text in a row."""
    return self.context_length - 1 - len(self.starts)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns captions as rows int32 `[len(texts) t]`; see `encode` and `pad_ids`.

    Raises:
      TypeError: `texts` is one string, whose characters would be taken for captions.
    """
    if isinstance(texts, str):
      raise TypeError(f"texts is the string {texts!r}; give a sequence of strings, as [{texts!r}]")
    if self._encodes_rows:
      return self.encoder.rows(texts, self.context_length)
    rows = [self.pad_ids(self.encoder.encode_head(text, self._most)) for text in texts]
    return np.stack(rows) if rows else np.empty((0, self.context_length), np.int32)

  @functools.cached_property
  def _encodes_rows(self) -> bool:
    """Whether the encoder can make all rows in one call."""
    return self.encoder == OpenAI() and (self.sot, self.eot, self.pad) == (49406, 49407, 0)

  def random_ids(self, rng: np.random.Generator, count: int) -> Int[np.ndarray, "count"]:
    """Draws ids of text with equal probability."""
    ends = {index for index in (*self.starts, self.eot, self.mask) if index < self.encoder.size}
    special = sorted(ends.union(self.encoder.special))
    ids = rng.integers(self.encoder.size - len(special), size=count)
    for index in special:
      ids += ids >= index
    return ids

  def word_numbers(self, ids: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Returns the number of each token's word, counted from 0; `ids` have no start and end of text."""
    begins, ends = _word_marks(self.encoder)
    first = begins[ids]
    first[1:] |= ends[ids[:-1]]
    first[:1] = True
    return np.cumsum(first) - 1

  def decode(self, ids: Iterable[int] | Int[np.ndarray, "n"]) -> str:
    """Returns readable text for ids of `encode` or for a row, up to the end of text, with `[mask]` for the mask token.

    Words are in lower case and separated by one space; bytes that are not valid UTF-8 become U+FFFD.
    """
    body = itertools.takewhile(lambda i: i != self.eot, map(int, ids))
    words = (i for i in body if i != self.sot)
    runs = itertools.groupby(words, key=lambda i: i == self.mask)
    texts = ("[mask] " * len(list(run)) if masked else self.encoder.decode(list(run)) for masked, run in runs)
    return " ".join(" ".join(texts).split())


def make_tokenizer(name: str, context_length: int) -> Tokenizer:
  """Makes the tokenizer named by `config.model.text.tokenizer`.

  Args:
    name: "openai"; "huggingface:FILE" for a `tokenizer.json`; "sentencepiece:FILE" for a SentencePiece model. The ids
      of start, end, mask and padding are those of the file's tokens "[CLS]", "[SEP]", "[MASK]", "[PAD]", or of other
      usual names. A missing start or mask gets a new id after the vocabulary; missing padding is 0. Options follow the
      file, such as "sentencepiece:FILE?start=none&pad=</s>&clean=lower,spaces": `start=none` for texts without a start,
      `start`, `end` and `pad` for other tokens of the file, and the `cleaning.STEPS` of a text instead of "spaces".
    context_length: `t`, number of tokens of a row.

  Raises:
    ValueError: the name or an option is unknown, or the file cannot be read or has no end of text.
  """
  kind, path, options = parse_name(name)
  encoders = {"huggingface": HuggingFace, "sentencepiece": SentencePiece}
  if name == "openai":
    return Tokenizer(context_length)
  if kind not in encoders or not path:
    raise ValueError(
      f"config.model.text.tokenizer={name!r}: choose 'openai', 'huggingface:FILE' (a tokenizer.json) or "
      "'sentencepiece:FILE'"
    )
  path = os.path.abspath(os.path.expanduser(path))
  if not os.path.isfile(path):
    raise ValueError(f"config.model.text.tokenizer={name!r}: file {path} does not exist")
  encoder = encoders[kind](path, options.pop("clean", ("spaces",)))
  given = {role: options[option] for option, role in _ROLES.items() if option in options}
  ids = {role: encoder.find(given.get(role, names)) for role, names in _NAMES.items()}
  if missing := next((role for role in given if ids[role] is None and given[role] != ("none",)), None):
    raise ValueError(f"config.model.text.tokenizer={name!r}: the file has no token {given[missing][0]!r:.80}")
  if ids["eot"] is None:
    raise ValueError(f"config.model.text.tokenizer={name!r}: no end of text, none of {', '.join(_NAMES['eot'])}")
  new_ids = itertools.count(encoder.size)
  needed = ("mask",) if given.get("sot") == ("none",) else ("sot", "mask")
  found = {role: next(new_ids) if ids[role] is None else ids[role] for role in needed}
  return Tokenizer(context_length, found.get("sot"), ids["eot"], found["mask"], ids["pad"] or 0, encoder)


def parse_name(name: str) -> tuple[str, str, dict[str, tuple[str, ...]]]:
  """Kind, file and options of the name of a tokenizer, see `make_tokenizer`; each option has one or more values.

  Raises:
    ValueError: an unknown option.
  """
  kind, _, rest = name.partition(":")
  path, _, query = (rest, "", "") if os.path.isfile(os.path.expanduser(rest)) else rest.partition("?")
  options = {}
  for part in query.split("&") if query else ():
    option, _, value = part.partition("=")
    where = f"config.model.text.tokenizer={name!r}: {part!r}"
    legal = (*_ROLES, "clean")
    if option not in legal:
      raise ValueError(f"{where}: expected one of {', '.join(legal)}{did_you_mean(option, legal)}")
    values = tuple(value.split(",")) if option == "clean" else (value,)
    if unknown := [step for step in values if option == "clean" and step not in STEPS]:
      raise ValueError(f"{where}: choose from {', '.join(STEPS)}{did_you_mean(unknown[0], STEPS)}")
    if values == ("none",) and option != "start":
      raise ValueError(f"{where}: only the start can be 'none'")
    options[option] = values
  return kind, path, options
