"""Tests of `declip_jax.data.text.augment`."""

import collections
import gzip
import pathlib
import time

import numpy as np
import pytest

from declip_jax.data.text import augment as texts
from declip_jax.data.text import tokenizer as tokenizers
from tools import build_synonyms

_TABLE = pathlib.Path(texts.__file__).with_name("synonyms.txt.gz")
_CAPTION = "two dogs and a cat sleep on the old red sofa"
# The result of NLTK 3.10 on WordNet 3.0: all lemmas of `wordnet.synsets(word)` without the word.
_NLTK = {
  "children": "baby,child,fry,kid,minor,nestling,nipper,shaver,small fry,tiddler,tike,tyke,youngster",
  "flew": "aviate,fell,flee,fly,pilot,take flight,vanish,vaporize,wing",
  "customer": "client",
  "beautiful": "",
  "red": "blood red,bolshevik,bolshie,bolshy,carmine,cerise,cherry,cherry red,crimson,flushed,loss,marxist,red faced,"
  "red ink,red river,reddened,reddish,redness,ruby,ruby red,ruddy,scarlet,violent",
  "leaves": "allow,allow for,bequeath,depart,entrust,exit,farewell,foliage,folio,forget,get out,give,go away,go forth,"
  "go out,impart,lead,leaf,leafage,leave,leave alone,leave behind,leave of absence,leave taking,parting,pass on,"
  "provide,pull up stakes,result,will",
}


def _rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


@pytest.mark.parametrize("word", _NLTK)
def test_synonyms_equal_wordnet(word):
  assert ",".join(texts.find_synonyms(word)) == _NLTK[word]
  assert texts.find_synonyms(word.title()) == texts.find_synonyms(word)


def test_table_is_small_and_carries_the_license():
  assert _TABLE.stat().st_size < 1_500_000
  table = gzip.decompress(_TABLE.read_bytes()).decode("ascii")
  for text in (table, _TABLE.with_name("SYNONYMS_LICENSE.txt").read_text(encoding="ascii")):
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text


def test_builder_reads_wordnet_files(tmp_path):
  head = "  1 This is the license.  \n  2   \n"
  rows = {
    "noun": "00000001 05 n 03 Dog 0 hot_dog 0 dog-house 1 000 | gloss\n00000002 05 n 01 dog 1 000 | gloss\n",
    "verb": "00000003 30 v 02 chase 0 dog 0 001 @ 00000001 v 0000 01 + 08 00 | gloss\n",
    "adj": "00000004 00 s 0a " + " ".join(f"{w} 0" for w in ("asleep(p)", *"bcdefghij")) + " 000 | gloss\n",
    "adv": "",
  }
  for part, text in rows.items():
    (tmp_path / f"data.{part}").write_text(head + text)
    (tmp_path / f"{part}.exc").write_text("mice mouse\nhot_dogs hot_dog\n" if part == "noun" else "")
  assert build_synonyms.read_license(tmp_path / "data.noun") == ["This is the license.", ""]
  table = [row.split("\t") for row in build_synonyms.table_rows(tmp_path)]
  assert table[:4] == [
    ["noun", "dog", "dog,dog house,hot dog"],
    ["noun", "dog-house", "dog,dog house,hot dog"],
    ["noun.exc", "mice", "mouse"],
    ["verb", "chase", "chase,dog"],
  ]
  assert ["adj", "asleep", "asleep,b,c,d,e,f,g,h,i,j"] in table
  build_synonyms.write_table(tmp_path, tmp_path / "a.gz")
  build_synonyms.write_table(tmp_path, tmp_path / "b.gz")
  assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_replacement_replaces_all_occurrences_of_one_content_word():
  words = ["the", "dog", "and", "the", "other", "dog", "of", "a", "zebra"]
  for seed in range(50):
    new = texts.replace_synonyms(words, _rng(seed))
    assert new[1] == new[5]
    assert new[1] in texts.find_synonyms("dog")
    assert new[:1] + new[2:5] + new[6:] == words[:1] + words[2:5] + words[6:]


def test_replacement_replaces_n_words_if_possible():
  words = _CAPTION.split()
  changed = [
    sum(a != b for a, b in zip(words, texts.replace_synonyms(words, _rng(1), n=n), strict=True)) for n in (0, 3, 99)
  ]
  assert changed[:2] == [0, 3]
  assert changed[2] == sum(w not in texts.STOP_WORDS and bool(texts.find_synonyms(w)) for w in words)


def test_swap_exchanges_two_uniformly_drawn_words():
  counts = collections.Counter(tuple(texts.swap_words("abcd", _rng(seed))) for seed in range(3000))
  assert len(counts) == 6
  assert all(sum(a != b for a, b in zip(words, "abcd", strict=True)) == 2 for words in counts)
  assert min(counts.values()) > 400


def test_deletion_keeps_order_rate_and_at_least_one_word():
  words = [str(i) for i in range(20_000)]
  kept = texts.delete_words(words, _rng())
  assert len(kept) / len(words) == pytest.approx(0.9, abs=0.01)
  assert list(map(int, kept)) == sorted(map(int, kept))
  assert {texts.delete_words(["a", "b"], _rng(seed), p=1.0)[0] for seed in range(20)} == {"a", "b"}
  assert texts.delete_words(["a"], _rng(), p=1.0) == ["a"]
  assert texts.delete_words([], _rng()) == []


def test_augment_uses_each_operation_a_third_of_the_time():
  # Only swapping keeps the bag of these words and changes their order; none of them has a synonym.
  words = [f"w{i}" for i in range(200)]
  kinds = collections.Counter()
  for seed in range(1500):
    new = texts.augment(" ".join(words), _rng(seed)).text.split()
    kinds["same" if new == words else "swap" if sorted(new) == sorted(words) else "delete"] += 1
  assert all(count == pytest.approx(500, abs=75) for count in kinds.values())
  assert len(kinds) == 3


def test_insertion_inserts_a_synonym_anywhere():
  words, places = ["the", "dog", "of", "a", "zebra"], collections.Counter()
  for seed in range(300):
    new = texts.insert_synonyms(words, _rng(seed))
    place = next(i for i in range(6) if new[:i] + new[i + 1 :] == words)
    assert new[place] in texts.find_synonyms("dog")
    places[place] += 1
  assert set(places) == set(range(6))
  assert min(places.values()) > 25
  assert len(texts.insert_synonyms(words, _rng(), n=3)) == 8
  for nothing in ([], ["the", "zq"]):
    assert texts.insert_synonyms(nothing, _rng()) == nothing


def test_augment_draws_among_the_operations_named():
  words = [f"w{i}" for i in range(100)]
  for seed in range(50):
    new = texts.augment(" ".join(words), _rng(seed), ["insert", "swap"]).text.split()
    assert sorted(new) == sorted(words)
    assert texts.augment("dog", _rng(seed), ["insert"]).text.count("dog") >= 1
    assert texts.augment("dog", _rng(seed), ["insert"]).text != "dog"


def test_augment_without_operations_keeps_the_words():
  assert texts.augment(f" {_CAPTION}\n", _rng(), ()) == (_CAPTION, "")


def test_augment_depends_on_the_rng_alone():
  first = [texts.augment(_CAPTION, _rng(seed)) for seed in range(30)]
  assert [texts.augment(_CAPTION, _rng(seed)) for seed in range(30)] == first
  assert len({text for text, _ in first}) > 10


@pytest.mark.parametrize(
  "text",
  ["", " \n\t", "dog", "\N{DOG FACE}", "\N{HEBREW LETTER ALEF} \u202b\N{ARABIC LETTER BEH}", "\ud800 a", "a the of"],
)
def test_augment_survives_odd_captions(text):
  for seed in range(20):
    new = texts.augment(text, _rng(seed)).text
    assert bool(new) == bool(text.strip())


def test_augment_is_linear_in_the_length():
  text = " ".join(f"zq{i}" for i in range(10_000))
  start = time.perf_counter()
  for seed in range(6):
    texts.augment(text, _rng(seed))
  assert time.perf_counter() - start < 5  # 0.2 s; a quadratic search takes minutes


def test_choose_caption_is_uniform_over_the_written_ones():
  rng = _rng()
  counts = collections.Counter(texts.choose_caption(("a", " ", "b", ""), rng) for _ in range(2000))
  assert set(counts) == {"a", "b"}
  assert counts["a"] == pytest.approx(1000, abs=120)
  for captions in ((), ("", " \n")):
    with pytest.raises(ValueError, match="no caption"):
      texts.choose_caption(captions, rng)


def test_captions_are_chosen_by_their_weights():
  rng = _rng()
  counts = collections.Counter(texts.choose_caption(("a", "b", "c"), rng, (3, 1)) for _ in range(2000))
  assert set(counts) == {"a", "b"}
  assert counts["a"] == pytest.approx(1500, abs=100)
  assert {texts.choose_caption((" ", "b", "c"), rng, (3, 1)) for _ in range(20)} == {"b"}
  assert {texts.choose_caption((" ", "b", "c"), rng, (1,)) for _ in range(50)} == {"b", "c"}


def test_whole_words_are_masked_with_all_their_tokens():
  tokenizer, rng = tokenizers.Tokenizer(), _rng()
  row = tokenizer(["an unbelievably disproportionate xylophonist photobombs the hippopotamuses"])[0]
  words = tokenizer.word_numbers(row[1 : np.flatnonzero(row == tokenizer.eot)[0]])
  counts = collections.Counter()
  for _ in range(400):
    masked = texts.mask_tokens(row, rng, tokenizer, slots=6, probability=0.3, whole_words=True)
    chosen = set(words[masked.position[masked.weight > 0] - 1])
    assert masked.weight.sum() == np.isin(words, list(chosen)).sum()
    counts.update(chosen)
  lengths = np.bincount(words)
  assert max(lengths) > 2
  assert set(counts) == set(np.flatnonzero(lengths <= 6))
  for slots in (1, 2):
    masked = texts.mask_tokens(row, rng, tokenizer, slots=slots, probability=1.0, whole_words=True)
    assert masked.weight.sum() <= slots


def test_masking_statistics_equal_bert():
  tokenizer, rng = tokenizers.Tokenizer(), _rng()
  row = tokenizer.pad_ids([320] * 75)
  n, fates = 1400, collections.Counter()
  for _ in range(n):
    masked = texts.mask_tokens(row, rng, tokenizer, slots=75)
    for token in masked.tokens[masked.position[masked.weight > 0]]:
      fates["mask" if token == tokenizer.mask else "same" if token == 320 else "random"] += 1
  selected = sum(fates.values())
  assert selected / (75 * n) == pytest.approx(0.15, abs=0.005)
  assert fates["mask"] / selected == pytest.approx(0.8, abs=0.015)
  assert fates["random"] / selected == pytest.approx(0.1, abs=0.01)
  assert fates["same"] / selected == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("length", [0, 1, 5, 75, 200])
def test_masked_text_restores_the_caption(slots, length):
  tokenizer, rng = tokenizers.Tokenizer(), _rng(7)
  row = tokenizer.pad_ids(list(range(1, length + 1)))
  before = row.copy()
  for _ in range(20):
    tokens, position, target, weight = texts.mask_tokens(row, rng, tokenizer, slots=slots, probability=0.5)
    assert (tokens.dtype, position.dtype, target.dtype, weight.dtype) == (np.int32, np.int32, np.int32, np.float32)
    assert position.shape == target.shape == weight.shape == (slots,)
    k = int(weight.sum())
    assert (np.diff(position[:k]) > 0).all()
    assert not position[k:].any() | target[k:].any() | weight[k:].any()
    restored = tokens.copy()
    restored[position[:k]] = target[:k]
    np.testing.assert_array_equal(restored, before)
    assert not np.isin(
      position[:k], np.flatnonzero(np.isin(before, [tokenizer.sot, tokenizer.eot, tokenizer.pad]))
    ).any()
    assert (
      (tokens[1 : min(length, 75) + 1] < tokenizers.ORDINARY_IDS) | (tokens[1 : min(length, 75) + 1] == 49408)
    ).all()
  np.testing.assert_array_equal(row, before)


def test_surplus_of_selected_positions_is_dropped_at_random():
  tokenizer, rng = tokenizers.Tokenizer(), _rng()
  row = tokenizer.pad_ids([320] * 60)
  counts = collections.Counter()
  for _ in range(600):
    counts.update(texts.mask_tokens(row, rng, tokenizer, slots=6, probability=1.0).position.tolist())
  assert set(counts) == set(range(1, 61))
  assert min(counts.values()) > 30
  assert max(counts.values()) < 95


def test_masking_depends_on_the_rng_alone():
  tokenizer = tokenizers.Tokenizer()
  row = tokenizer([_CAPTION])[0]
  for a, b in zip(*(texts.mask_tokens(row, _rng(3), tokenizer, slots=8) for _ in range(2)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_exclamation_mark_is_not_padding():
  tokenizer = tokenizers.Tokenizer(context_length=8)
  masked = texts.mask_tokens(tokenizer.pad_ids([0, 0, 0]), _rng(), tokenizer, slots=6, probability=1.0)
  assert masked.weight.sum() == 3


def test_masking_requires_an_end_of_text():
  with pytest.raises(ValueError, match=r"\[320, 1929\].*49407"):
    texts.mask_tokens(np.array([320, 1929]), _rng(), tokenizers.Tokenizer(), slots=4)


def test_slots_bound_the_selection():
  assert texts.mlm_slots() == 20
  assert texts.mlm_slots(3, 0.15) == 1
  assert texts.mlm_slots(77, 1.0) == 75
  selected = _rng().binomial(75, 0.15, 100_000)
  assert (selected > texts.mlm_slots()).mean() < 0.005
