"""Cleans captions as OpenAI's code does: repairs mojibake, decodes entities, collapses spaces, converts to lower case.

`STEPS` are the parts of this, and others of SigLIP, for tokenizers of other models.

A caption may have megabytes, although only its first tokens are used: `clean_head` reads no more than these need.
"""

from collections.abc import Callable, Iterator, Mapping
import html
import re
import string
import unicodedata

import ftfy

SHORT = 4096  # largest number of characters of a caption that is always read as a whole
_SEGMENT = 1_000_000  # largest number of characters that ftfy repairs at once
_DEPTH = 16  # levels of escaping within which ftfy has repaired the text around an entity
_REPAIR = ftfy.TextFixerConfig(explain=False)
_REPAIR_MARKUP = ftfy.TextFixerConfig(explain=False, unescape_html=False)
# An ampersand that is escaped many times: &amp;amp;amp; and the like, in every spelling that ftfy decodes.
_NESTED = re.compile(rf"&(?:(?:amp|AMP|#0{{0,22}}38|#[xX]0{{0,21}}26);){{{_DEPTH + 1},}}")
_LONG_NUMBER = re.compile(r"&#0*([0-9]{8})[0-9]*")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPECIAL = re.compile(r"<\|(?:start|end)oftext\|>")


def clean(text: str) -> str:
  """Cleans a caption.

  Printable ASCII without `&` needs neither ftfy nor HTML decoding, since everything they repair contains a control
  character, an entity or a character beyond ASCII. This shortcut takes 1 us instead of 50.
  """
  return _finished(repair(text))


def repair(text: str) -> str:
  """Repairs mojibake by ftfy and decodes entities twice."""
  return text if _is_plain(text) else _unescaped("".join(_repaired(text)))


def clean_head(text: str, is_enough: Callable[[str], bool]) -> str:
  """Cleans as much of a caption as is needed.

  Args:
    text: a caption.
    is_enough: whether the beginning of the cleaned caption, which ends with a word, is enough.

  Returns:
    `clean(text)`, or a beginning of it that is enough.
  """
  if len(text) <= SHORT or _is_plain(text):
    return clean(text)
  pieces, length, due = [], 0, SHORT
  for piece in _repaired(text):
    pieces.append(piece)
    length += len(piece)
    if length >= due:
      repaired, due = "".join(pieces), 2 * length
      # No entity contains these characters, and the case of a word does not depend on other words.
      head = _finished(_unescaped(repaired[: max(map(repaired.rfind, " \t\n\f")) + 1]))
      if is_enough(head):
        return head
  return _finished(_unescaped("".join(pieces)))


def without_special(text: str) -> str:
  """A cleaned caption without the literal strings `<|startoftext|>` and `<|endoftext|>`."""
  return _SPECIAL.sub(" ", text) if "<|" in text else text


def has_text(caption: str) -> bool:
  """Whether a caption has text: not only spaces, invisible characters and special tokens.

  Entities count as the characters that they represent: `&nbsp;` is a space. A caption with a NUL is not a text, but
  in an encoding that was not recognised.
  """
  if "\0" in caption:
    return False
  if caption[:1].isalnum():
    return True
  return _is_readable(clean_head(caption, _is_readable))


def _is_readable(cleaned: str) -> bool:
  return any(map(_is_visible, without_special(cleaned)))


def _is_visible(character: str) -> bool:
  return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Mn", "Zl", "Zp", "Zs")


def _is_plain(text: str) -> bool:
  return text.isascii() and text.isprintable() and "&" not in text


def _finished(text: str) -> str:
  return " ".join(text.split()).lower()


def _repaired(text: str) -> Iterator[str]:
  """Yields what `ftfy.fix_text` joins: the repaired lines, the longest of them in segments.

  As in ftfy, entities remain from the first line with a `<`, which looks like HTML.
  """
  config, start = _REPAIR, 0
  while start < len(text):
    stop = min(text.find("\n", start) + 1 or len(text), start + _SEGMENT)
    segment = text[start:stop]
    if "<" in segment:
      config = _REPAIR_MARKUP
    yield ftfy.fix_text_segment(segment if config is _REPAIR_MARKUP else _shallow(segment), config)
    start = stop


def _collapse(text: str) -> str:
  return " ".join(text.split())


# Steps by the names that `tokenizer.make_tokenizer` knows, in any order. open_clip's version of SigLIP has all of them,
# big_vision's all but "repair", and that of transformers neither this nor "underscores", which become spaces before
# punctuation is removed.
STEPS: Mapping[str, Callable[[str], str]] = {
  "repair": repair,
  "underscores": lambda text: text.replace("_", " "),
  "lower": str.lower,
  "no_punctuation": lambda text: text.translate(_PUNCTUATION),
  "spaces": _collapse,
}


def _shallow(text: str) -> str:
  """Shortens ampersands that are escaped many times, such as `&amp;amp;amp;`.

  ftfy decodes one level of all of them at a time, and repairs the whole text after each level, which would take very
  long. Fewer levels give the same result if two conditions hold: the ampersands are decoded in the same order, and
  between two of them remain `_DEPTH` levels, enough for ftfy to repair the text around the first.
  """
  if "&" not in text:
    return text
  depths = sorted({nested.group().count(";") for nested in _NESTED.finditer(text)})
  levels, last, level = {}, _DEPTH, _DEPTH
  for depth in depths:
    level += min(depth - last, _DEPTH)
    levels[depth], last = level, depth
  return _NESTED.sub(lambda nested: _last_levels(nested.group(), levels), text) if depths else text


def _last_levels(nested: str, levels: dict[int, int]) -> str:
  parts = nested[1:-1].split(";")
  return "&" + ";".join(parts[-levels[len(parts)] :]) + ";"


def _unescaped(text: str) -> str:
  """Decodes entities twice, as OpenAI's code does."""
  return html.unescape(_with_short_numbers(html.unescape(_with_short_numbers(text))))


def _with_short_numbers(text: str) -> str:
  """Shortens numeric entities: Python reads no number of more than 4300 digits. Invalid ones remain invalid."""
  if "&#" not in text:
    return text
  return _LONG_NUMBER.sub(r"&#\1", text)
