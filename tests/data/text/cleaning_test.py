"""Long captions take bounded time and have the tokens of the whole text; captions without text count as missing."""

import html
import random
import time

import ftfy
import instant_clip_tokenizer
import numpy as np
import pytest

from declip_jax.data.text import cleaning
from declip_jax.data.text.tokenizer import Tokenizer

PARTS = [
  "a",
  "dog ",
  "&amp;",
  "&lt;",
  "&",
  "amp;",
  "#38;",
  "&#233;",
  "é",
  "Ã©",
  " ",
  "\n",
  "'s",
  "!!!",
  "1",
  "中文",
  "<",
]
PARTS += [
  "<|endoftext|>",
  "Σ",
  "\u00a0",
  "\t",
  "&nbsp;",
  "eacute;",
  "ab" * 40,
  "!?" * 30,
  "\u200d",
  "_",
  "²",
  "\x1b[0m",
]

ENCODER = instant_clip_tokenizer.Tokenizer()


def _whole(text: str) -> str:
  return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def _rows(text: str, length: int) -> np.ndarray:
  cleaned = _whole(text).replace("<|endoftext|>", " ").replace("<|startoftext|>", " ")
  return ENCODER.tokenize_batch([cleaned], length)[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(12, id="few"), pytest.param(500, id="many", marks=pytest.mark.slow)])
def test_random_long_captions_have_the_tokens_of_the_whole(count: int) -> None:
  rng = random.Random(count)
  for _ in range(count):
    parts = rng.sample(PARTS, rng.randint(1, 6))
    text = "".join(rng.choice(parts) for _ in range(rng.choice([50, 3000])))[:9000]
    text += "&" + "amp;" * rng.randint(0, 60) + rng.choice(parts)
    assert cleaning.clean(text) == _whole(text), repr(text[:200])
    for length in (5, 77):
      want = _rows(text, length)
      np.testing.assert_array_equal(Tokenizer(length)([text])[0], want, repr(text[:200]))
      other = Tokenizer(length, mask=49406, sot=49407, eot=49408)([text])[0]  # encodes text by text
      np.testing.assert_array_equal(other[1:-1][want[1:-1] < 49406], want[1:-1][want[1:-1] < 49406])


@pytest.mark.parametrize("depth", [3, 17, 60])
@pytest.mark.parametrize("level", ["amp;", "#38;", "#x26;", "AMP;"])
def test_nested_ampersands_are_decoded_as_by_ftfy(depth: int, level: str) -> None:
  for text in (
    f"&{level * depth}eacute; Ã© <b>",
    f"&{level * depth}lt; &{level * (depth + 40)}eacute; Ã©&amp;",
    "&" + level * depth,
  ):
    assert cleaning.clean(text) == _whole(text)


LONG = {
  "a word": "x" * 10**6,
  "two letters": "ab" * 500_000,
  "signs": "!" * 10**6,
  "words": "a dog " * 200_000,
  "lines": "中文\n" * 300_000,
  "ampersands": "&" + "amp;" * 250_000,
  "markup": "<&" + "amp;" * 250_000,
  "a number": "&#" + "9" * 10**6 + ";",
  "spaces": "&nbsp;" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_captions_take_bounded_time(name: str) -> None:
  start = time.perf_counter()
  Tokenizer()([LONG[name]])
  assert cleaning.has_text(LONG[name]) == (name != "spaces")
  assert time.perf_counter() - start < 10  # in quadratic time it would take minutes


@pytest.mark.parametrize(("number", "character"), [("9" * 5000, "\ufffd"), ("0" * 5000 + "65", "a"), ("233", "é")])
def test_numbers_of_characters_may_have_any_length(number: str, character: str) -> None:
  assert cleaning.clean(f"x &#{number};y") == f"x {character}y"


@pytest.mark.parametrize(
  "caption",
  [
    "",
    " ",
    "&nbsp;",
    "\u200b",
    "\u00ad",
    "<|endoftext|>",
    "\ufeff",
    "\u2060\u200d",
    "&#160; &nbsp;",
    "\0",
    "¬rL0 \0N9S",
  ],
)
def test_captions_without_text(caption: str) -> None:
  assert not cleaning.has_text(caption)


@pytest.mark.parametrize(
  "caption", ["a", "...", "中", "&amp;", "\u200bx", "🎉", "<|endoftext|>x", "1", "&nbsp;é", "&lt;"]
)
def test_captions_with_text(caption: str) -> None:
  assert cleaning.has_text(caption)
