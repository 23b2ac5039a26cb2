"""Tests of `declip_jax.data.tokenizer` against ids of openai/CLIP (`tests/fixtures/tokens.npz`)."""

import html
import json
import pathlib
import pickle
import re

import ftfy
import numpy as np
import pytest

from declip_jax.data import tokenizer as tokenizers

_FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "tokens.npz"
_SPECIAL = re.compile(r"<\|(start|end)oftext\|>")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  """Captions, their ids by `clip.tokenize(..., truncate=True)`, and a few decoded texts."""
  return dict(np.load(_FIXTURE))


def _clean_slowly(text: str) -> str:
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return re.sub(r"\s+", " ", text).strip().lower()


def _fuzz(alphabet: str, count: int) -> list[str]:
  rng = np.random.default_rng(0)
  letters = np.array(list(alphabet))
  return ["".join(rng.choice(letters, size)) for size in rng.integers(0, 40, count)]


def test_ids_equal_openai_wherever_no_special_token_is_spelled_out(golden):
  captions = json.loads(str(golden["captions_json"]))
  ids = tokenizers.Tokenizer()(captions)
  spelled = np.array([bool(_SPECIAL.search(caption)) for caption in captions])
  assert len(captions) > 400
  assert spelled.sum() == 4
  np.testing.assert_array_equal(ids[~spelled], golden["ids"][~spelled])


def test_spelled_out_special_tokens_are_dropped():
  tokenizer = tokenizers.Tokenizer()
  assert tokenizer.encode("a <|endoftext|> b") == tokenizer.encode("a b")
  assert tokenizer.encode("a&lt;|STARTOFTEXT|>b") == tokenizer.encode("a b")
  assert max(tokenizer.encode("<|start<|endoftext|>oftext|> <|mask|>")) < tokenizers.ORDINARY_IDS


@pytest.mark.parametrize(
  ("alphabet", "count"),
  [
    ("".join(map(chr, range(128))), 3000),
    ("".join(map(chr, range(32, 127))), 3000),
    ("&;#x0123456789ampltgqu \t\n", 3000),
    (
      "aB .\N{NO-BREAK SPACE}\N{LEFT DOUBLE QUOTATION MARK}\xe9\xc3\xa9\u1680\u2028\u3000\x85\x1c\x1f\ud83d\ude00",
      1000,
    ),
  ],
  ids=["ascii", "printable", "entities", "unicode"],
)
def test_clean_equals_the_long_way(alphabet, count):
  for text in _fuzz(alphabet, count):
    assert tokenizers.clean(text) == _clean_slowly(text), repr(text)


def test_known_ids():
  row = tokenizers.Tokenizer()(["A photo of\na  DOG"])[0]
  assert row.dtype == np.int32
  np.testing.assert_array_equal(row[:8], [49406, 320, 1125, 539, 320, 1929, 49407, 0])
  assert not row[7:].any()


def test_truncation_keeps_the_end_of_text():
  tokenizer = tokenizers.Tokenizer(context_length=8)
  np.testing.assert_array_equal(tokenizer.pad_ids(list(range(1, 7))), [49406, 1, 2, 3, 4, 5, 6, 49407])
  np.testing.assert_array_equal(tokenizer.pad_ids(list(range(1, 9))), [49406, 1, 2, 3, 4, 5, 6, 49407])
  np.testing.assert_array_equal(tokenizer.pad_ids([]), [49406, 49407, 0, 0, 0, 0, 0, 0])


def test_layout_of_declip_moves_only_the_special_ids():
  ours, theirs = tokenizers.Tokenizer(), tokenizers.Tokenizer(mask=49406, sot=49407, eot=49408)
  texts = ["a dog", ""]
  expected = np.select([ours(texts) == 49406, ours(texts) == 49407], [49407, 49408], ours(texts))
  np.testing.assert_array_equal(theirs(texts), expected)
  assert ours.vocab_size == theirs.vocab_size == 49409
  assert theirs.decode([49407, 320, 49406, 49408, 0]) == "a [mask]"


def test_decode_equals_openai(golden):
  captions = json.loads(str(golden["captions_json"]))
  tokenizer = tokenizers.Tokenizer()
  for row, text in zip(golden["decoded_row"], golden["decoded_first"], strict=True):
    assert tokenizer.decode(tokenizer.encode(captions[row])) == text.strip()


def test_decode_of_a_masked_row():
  tokenizer = tokenizers.Tokenizer(context_length=10)
  row = tokenizer(["a photo of a dog"])[0]
  row[[2, 3, 5]] = tokenizer.mask
  assert tokenizer.decode(row) == "a [mask] [mask] a [mask]"
  assert tokenizer.decode([tokenizer.mask]) == "[mask]"
  assert tokenizer.decode(tokenizer([""])[0]) == ""


def test_pickles_after_use():
  tokenizer = tokenizers.Tokenizer(context_length=16)
  before = tokenizer(["a dog"])
  after = pickle.loads(pickle.dumps(tokenizer))
  assert after == tokenizer
  np.testing.assert_array_equal(after(["a dog"]), before)


def test_odd_captions():
  texts = [
    "",
    " \n",
    "\N{DOG FACE}" * 50,
    "\N{HEBREW LETTER ALEF}" * 9,
    "\ud800",
    "\x00",
    "word " * 10_000,
    "x" * 10_000,
  ]
  ids = tokenizers.Tokenizer()(texts)
  assert ids.shape == (8, 77)
  np.testing.assert_array_equal((ids == 49407).sum(axis=1), 1)
  np.testing.assert_array_equal(ids[5], ids[0])
  np.testing.assert_array_equal(ids[6:, -1], 49407)
  assert tokenizers.Tokenizer()([]).shape == (0, 77)


def test_errors_name_the_value():
  with pytest.raises(TypeError, match="'a dog'"):
    tokenizers.Tokenizer()("a dog")
  with pytest.raises(ValueError, match="context_length is 1"):
    tokenizers.Tokenizer(context_length=1)
