"""Tests of `declip_jax.data.text.tokenizer` against ids of openai/CLIP (`tests/fixtures/tokens.npz`)."""

import html
import json
import pathlib
import pickle
import re

import ftfy
import numpy as np
import pytest
import references as reference
import tokenizer_files

from declip_jax.data.text import tokenizer as tokenizers
from declip_jax.weights import vocabulary

_FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures" / "tokens.npz"
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
  assert len(captions) == 1500
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
def test_clean_equals_its_reference(alphabet, count):
  for text in _fuzz(alphabet, count):
    assert tokenizers.clean(text) == _clean_slowly(text), repr(text)


@pytest.mark.parametrize(
  ("text", "expected"), [("a < b &amp;amp; c", "a < b & c"), ("<i>&amp;eacute;t&amp;eacute;</i>", "<i>été</i>")]
)
def test_entities_are_decoded_twice(text, expected):
  """ftfy decodes no entities in texts with a <, so both decodings are `clean`'s own."""
  assert tokenizers.clean(text) == expected


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


def test_declips_layout_moves_only_the_special_ids():
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
  with pytest.raises(ValueError, match="context_length=1"):
    tokenizers.Tokenizer(context_length=1)


def test_word_boundaries_agree_with_decoding():
  tokenizer = tokenizers.Tokenizer()
  for text in (
    "an unbelievable xylophonist's photobombing!",
    "dog",
    "a\N{DOG FACE} b",
    "\xe9t\xe9 \N{CJK UNIFIED IDEOGRAPH-72D7}",
  ):
    ids = np.array(tokenizer.encode(text))
    words = tokenizer.word_numbers(ids)
    parts = [tokenizer.decode(ids[words == word]) for word in range(words[-1] + 1)]
    assert " ".join(parts) == tokenizer.decode(ids)
    assert all(" " not in part for part in parts)
  assert tokenizer.word_numbers(np.zeros(0, int)).size == 0


_WORDS = ["a", "photo", "of", "the", "old", "red", "dogs", "sleeping", "unbelievably", "quick", "foxes", "jumping"]


def _sentences(count: int = 400) -> list[str]:
  rng = np.random.default_rng(0)
  return [" ".join(rng.choice(_WORDS, 6)) for _ in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
  """Other tokenizers: CLIP's own in Hugging Face's format, one like BERT's, and two of SentencePiece."""
  hf = pytest.importorskip("tokenizers")
  spm = pytest.importorskip("sentencepiece")
  folder = tmp_path_factory.mktemp("tokenizers")
  clip = hf.Tokenizer(
    hf.models.BPE(
      vocabulary.vocabulary(),
      [tuple(merge.split()) for merge in vocabulary.merges()],
      end_of_word_suffix="</w>",
      unk_token="<|endoftext|>",
    )
  )
  clip.normalizer = hf.normalizers.Lowercase()
  pattern = hf.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
  clip.pre_tokenizer = hf.pre_tokenizers.Sequence(
    [
      hf.pre_tokenizers.Split(pattern, "removed", invert=True),
      hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  clip.decoder = hf.decoders.BPEDecoder(suffix="</w>")
  clip.add_special_tokens(list(vocabulary.SPECIAL))
  clip.save(str(folder / "clip.json"))
  bert = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
  bert.normalizer, bert.pre_tokenizer = hf.normalizers.BertNormalizer(), hf.pre_tokenizers.BertPreTokenizer()
  bert.decoder = hf.decoders.WordPiece()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  bert.train_from_iterator(_sentences(), hf.trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
  bert.save(str(folder / "bert.json"))
  model = folder / "pieces.model"
  with model.open("wb") as file:
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter(_sentences()), model_writer=file, vocab_size=36, pad_id=3, model_type="bpe", minloglevel=2
    )
  return {
    "clip": f"huggingface:{folder / 'clip.json'}",
    "bert": f"huggingface:{folder / 'bert.json'}",
    "pieces": f"sentencepiece:{model}",
  }


def test_clips_tokenizer_as_a_hugging_face_file_gives_the_same_ids(files):
  ours, theirs = tokenizers.Tokenizer(20), tokenizers.make_tokenizer(files["clip"], 20)
  texts = [*_sentences(20), "it's 2 o'clock!", "word " * 100, ""]
  np.testing.assert_array_equal(theirs(texts), ours(texts))
  assert (theirs.sot, theirs.eot, theirs.mask, theirs.pad, theirs.vocab_size) == (49406, 49407, 49408, 0, 49409)
  ids = np.array(ours.encode("an unbelievable xylophonist"))
  np.testing.assert_array_equal(theirs.word_numbers(ids), ours.word_numbers(ids))
  assert theirs.decode(theirs(["a photo"])[0]) == "a photo"


@pytest.mark.parametrize("name", ["bert", "pieces"])
def test_tokenizer_files_encode_texts(files, name):
  tokenizer = pickle.loads(pickle.dumps(tokenizers.make_tokenizer(files[name], 64)))
  special = {tokenizer.sot, tokenizer.eot, tokenizer.mask, tokenizer.pad}
  assert len(special) == 4
  assert max(special) < tokenizer.vocab_size
  text = "a photo of the old red dogs sleeping"
  row = tokenizer([text])[0]
  end = int(np.flatnonzero(row == tokenizer.eot)[0])
  assert row[0] == tokenizer.sot
  assert (row[end + 1 :] == tokenizer.pad).all()
  assert not special & set(row[1:end].tolist())
  assert tokenizer.decode(row) == text
  words = tokenizer.word_numbers(row[1:end])
  assert [tokenizer.decode(row[1:end][words == word]) for word in range(words[-1] + 1)] == text.split()
  random = tokenizer.random_ids(np.random.default_rng(0), 5000)
  assert set(random) == set(range(tokenizer.encoder.size)) - set(tokenizer.encoder.special)
  for odd in ("", "\x00", "\ud800 a", "\N{DOG FACE}", "[SEP] </s> a", "word " * 10_000):
    assert (tokenizer([odd]) == tokenizer.eot).sum() == 1


def test_the_unknown_token_of_a_unigram_file_represents_text(tmp_path):
  """As in the files of T5, which name it by its id; `tokenizers` gives the ids."""
  hf = pytest.importorskip("tokenizers")
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.5)]
  theirs = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=2))
  theirs.add_special_tokens(["<pad>", "</s>", "<unk>"])
  theirs.save(str(tmp_path / "tokenizer.json"))
  ours = tokenizers.make_tokenizer(f"huggingface:{tmp_path / 'tokenizer.json'}?start=none", 8)
  assert ours.encode("a#b</s>") == theirs.encode("a#b").ids == [3, 2, 4]
  assert ours.encoder.special == (0, 1)


def test_missing_special_tokens_get_new_ids(files):
  tokenizer = tokenizers.make_tokenizer(files["pieces"], 24)
  assert tokenizer.mask == tokenizer.encoder.size  # it was trained without a mask token
  assert (tokenizer.sot, tokenizer.eot, tokenizer.pad) == (1, 2, 3)


def test_a_bad_tokenizer_name_is_rejected_with_the_legal_ones(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer='bert': choose 'openai', 'huggingface:FILE'"):
    tokenizers.make_tokenizer("bert", 77)
  with pytest.raises(ValueError, match="none.json does not exist"):
    tokenizers.make_tokenizer(f"huggingface:{tmp_path / 'none.json'}", 77)
  broken = tmp_path / "broken"
  broken.write_text("{}")
  for kind in ("huggingface", "sentencepiece"):
    pytest.importorskip("tokenizers")
    pytest.importorskip("sentencepiece")
    with pytest.raises(ValueError, match="broken is no"):
      tokenizers.make_tokenizer(f"{kind}:{broken}", 77)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> dict[str, object]:
  """Ids by transformers' and open_clip's tokenizers of SigLIP, see `fixtures/make_siglip.py`, and their files."""
  folder = tmp_path_factory.mktemp("siglip")
  return {**tokenizer_files.write(folder), "folder": folder}


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("siglip", "sentencepiece:{}/spiece.model?start=none&pad=</s>&clean=lower,no_punctuation,spaces"),
    ("siglip2", "huggingface:{}/tokenizer.json?start=none&pad=<pad>&clean=lower"),
    ("open_clip", "huggingface:{}/tokenizer.json?start=none&clean=repair,underscores,lower,no_punctuation,spaces"),
  ],
)
def test_ids_equal_those_of_siglip(siglip, name, file):
  tokenizer = tokenizers.make_tokenizer(file.format(siglip["folder"]), 16)
  found = tokenizer(json.loads(str(siglip["captions_json"])))
  # Before a caption that begins with a space, transformers' tokenizer of SigLIP has a mark too many.
  same = [index for index in range(len(found)) if (name, index) != ("siglip", 3)]
  np.testing.assert_array_equal(found[same], siglip[name][same])
  assert tokenizer.decode(siglip[name][0]) == tokenizer.decode(siglip[name][0][:-1])
  assert (tokenizer.sot, tokenizer.starts, tokenizer.eot) == (None, (), 1)
  assert tokenizer.mask == (tokenizer.encoder.size if name == "siglip" else 4)
  assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("star=none", r"'star=none': expected one of start, end, pad, clean.*start"),
    ("clean=lover", r"choose from repair, .*lower"),
    ("pad=[PAD]", r"the file has no token '\[PAD\]'"),
    ("pad=none", "only the start can be 'none'"),
  ],
)
def test_wrong_options_of_a_tokenizer_are_rejected(siglip, options, message):
  with pytest.raises(ValueError, match=f"config.model.text.tokenizer=.*{message}"):
    tokenizers.make_tokenizer(f"sentencepiece:{siglip['folder']}/spiece.model?{options}", 16)


def test_a_nul_is_not_a_space(tmp_path):
  """SentencePiece takes it for an unknown character, and ftfy, as all control characters, for nothing."""
  pytest.importorskip("sentencepiece")
  (tmp_path / "spiece.model").write_bytes(reference.load("siglip_tokens")["spiece"].tobytes())
  name = f"sentencepiece:{tmp_path / 'spiece.model'}?start=none&pad=</s>"
  plain, repaired = (
    tokenizers.make_tokenizer(f"{name}&clean={steps}", 16) for steps in ("lower,spaces", "repair,lower,spaces")
  )
  assert plain.encode("a\0cat") != plain.encode("a cat")
  assert 2 in plain.encode("a\0cat")
  assert repaired.encode("a\0cat") == repaired.encode("acat")
