"""Captions to token ids: OpenAI's cleaning and byte-pair encoding, in front of a Rust implementation of the latter.

Ids equal those of `clip.tokenize(..., truncate=True)` of openai/CLIP but for two classes of captions: we drop literal
special tokens (see `Tokenizer.encode`), and U+0345 and code points that Unicode has not assigned may split elsewhere,
because the two sides carry different versions of the Unicode tables.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import html
import itertools
import re

import ftfy
import instant_clip_tokenizer
import numpy as np

ORDINARY_IDS = 49406  # 256 bytes, 256 bytes that end a word, 48,894 merges
_SPECIAL_TEXT = re.compile(r"<\|(?:start|end)oftext\|>")


def clean(text: str) -> str:
  """Returns a caption as OpenAI encodes it: mojibake repaired, entities decoded, spaces collapsed, lower case.

  Printable ASCII without `&` needs neither ftfy nor HTML decoding: every repair of theirs starts from a control
  character, an entity or a character beyond ASCII. That path takes 1 us instead of 50.
  """
  if not (text.isascii() and text.isprintable() and "&" not in text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


@functools.cache
def _byte_pairs() -> instant_clip_tokenizer.Tokenizer:
  """Builds the encoder once per process: it takes 60 ms and does not pickle."""
  return instant_clip_tokenizer.Tokenizer()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Encodes captions; picklable and cheap to make.

  The special ids are plain fields. The defaults are OpenAI's, with the mask token of masked language modelling behind
  them, so that OpenAI's ids and weights fit unchanged. DeCLIP's released models insert the mask before the other two,
  `Tokenizer(mask=49406, sot=49407, eot=49408)`; `weights.dialects` puts their rows into our order.

  Attributes:
    context_length: `t`, tokens of an encoded row, with start and end of text.
    sot: id of the start of text.
    eot: id of the end of text.
    mask: id of the mask.
    pad: id of the filling; 0 as in OpenAI's code, which is also the id of a `!` inside a word.
  """

  context_length: int = 77
  sot: int = 49406
  eot: int = 49407
  mask: int = 49408
  pad: int = 0

  def __post_init__(self) -> None:
    if self.context_length < 2:
      raise ValueError(f"context_length is {self.context_length}; start and end of text need at least 2")

  @property
  def vocab_size(self) -> int:
    """Number of ids, the specials included."""
    return ORDINARY_IDS + 3

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a caption, cleaned but not truncated, without start and end of text.

    The literal strings `<|startoftext|>` and `<|endoftext|>` are dropped: OpenAI's tokenizer turns them into the
    special ids, and so lets a caption end itself. A literal `<|mask|>` is ordinary text, as in DeCLIP.
    """
    text = clean(text)
    if "<|" in text:
      text = _SPECIAL_TEXT.sub(" ", text)
    return _byte_pairs().encode(text)

  def pad_ids(self, ids: Sequence[int]) -> np.ndarray:
    """Returns ids of `encode` as a row int32 `[t]`: start of text, ids (as many as fit), end of text, filling."""
    ids = ids[: self.context_length - 2]
    row = np.full(self.context_length, self.pad, np.int32)
    row[: len(ids) + 2] = [self.sot, *ids, self.eot]
    return row

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Returns captions as rows int32 `[len(texts) t]`; see `encode` and `pad_ids`.

    Raises:
      TypeError: `texts` is one string, whose characters would be taken for captions.
    """
    if isinstance(texts, str):
      raise TypeError(f"texts is the string {texts!r}; give a sequence of strings, as [{texts!r}]")
    rows = [self.pad_ids(self.encode(text)) for text in texts]
    return np.stack(rows) if rows else np.empty((0, self.context_length), np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns readable text for ids of `encode` or for a row: up to the end of text, with `[mask]` for the mask token.

    Words are apart by one space and lower case; bytes that are no valid UTF-8 show as U+FFFD.
    """
    body = itertools.takewhile(lambda i: i != self.eot, map(int, ids))
    words = (i for i in body if i != self.sot)
    runs = itertools.groupby(words, key=lambda i: i == self.mask)
    texts = ("[mask] " * len(list(run)) if masked else _byte_pairs().decode(list(run)) for masked, run in runs)
    return " ".join(" ".join(texts).split())
