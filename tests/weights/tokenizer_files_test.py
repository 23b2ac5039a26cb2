"""Tests of `declip_jax.weights.tokenizer_files`: exported tokenizers add what ours adds, and are found again."""

import json
from pathlib import Path

import numpy as np
import pytest
import references as reference

from declip_jax.data.text.tokenizer import make_tokenizer
from declip_jax.weights.read import from_state_dict, read
from declip_jax.weights.tokenizer_files import copy_tokenizer, exported_files, padding_token, resolve_tokenizer
from declip_jax.weights.write import write

TEXTS = ["a photo of a dog", "", "two cats"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
  """A `tokenizer.json` like Gemma's that adds nothing to a text, and truncates and pads it."""
  content = json.loads(str(reference.load("siglip_tokens")["tokenizer_json"]))
  content["post_processor"] = None
  content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
  (tmp_path / "mine.json").write_text(json.dumps(content), encoding="utf-8")
  return tmp_path / "mine.json"


@pytest.mark.parametrize("options", ["start=none&pad=<pad>", "start=<bos>", "start=none&pad=<eos>"])
def test_exported_files_add_our_start_and_end(options: str, file: Path) -> None:
  hf = pytest.importorskip("tokenizers")
  name = f"huggingface:{file}?{options}"
  ours, files = make_tokenizer(name, 64), exported_files(name, 64, tokenizer_class="GemmaTokenizer")
  theirs = hf.Tokenizer.from_str(files["tokenizer.json"].decode())
  about = json.loads(files["tokenizer_config.json"])
  theirs.enable_padding(length=64, pad_id=theirs.token_to_id(about["pad_token"]))
  np.testing.assert_array_equal([encoded.ids for encoded in theirs.encode_batch(TEXTS)], ours(TEXTS))
  assert (about["eos_token"], about["model_max_length"], about["tokenizer_class"]) == ("<eos>", 64, "GemmaTokenizer")


def test_a_tokenizer_with_a_start_that_its_file_lacks_is_not_exported(tmp_path: Path) -> None:
  hf = pytest.importorskip("tokenizers")
  pieces = hf.Tokenizer(hf.models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
  pieces.save(str(tmp_path / "tokenizer.json"))
  assert exported_files(f"huggingface:{tmp_path / 'tokenizer.json'}?start=none", 8)
  assert exported_files(f"huggingface:{tmp_path / 'tokenizer.json'}", 8) == {}


def test_the_copy_of_a_tokenizer_is_found_beside_an_export(file: Path, tmp_path: Path) -> None:
  (tmp_path / "export").mkdir()
  name = copy_tokenizer(f"huggingface:{file}?start=none&clean=lower", tmp_path / "export")
  assert name == "huggingface:tokenizer.json?start=none&clean=lower"
  moved = (tmp_path / "export").rename(tmp_path / "moved")
  expected = f"huggingface:{moved / 'tokenizer.json'}?start=none&clean=lower"
  assert resolve_tokenizer(name, moved) == resolve_tokenizer(expected, moved) == expected
  assert (moved / "tokenizer.json").read_bytes() == file.read_bytes()
  for other in ("openai", "huggingface:none.json?start=none"):
    assert copy_tokenizer(other, moved) == resolve_tokenizer(other, moved) == other


@pytest.mark.slow
def test_our_export_has_the_file_of_its_tokenizer(file: Path, tmp_path: Path) -> None:
  told = reference.TOLD | {"image.heads": 4, "text.heads": 2, "text.eot": 1}
  told["text.tokenizer"] = f"huggingface:{file}?start=none&clean=lower"
  weights = from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), told)
  write(weights, tmp_path / "export", "orbax")
  content = file.read_bytes()
  file.unlink()
  moved = (tmp_path / "export").rename(tmp_path / "moved")
  found = read(moved).model["text"]["tokenizer"]
  assert found == f"huggingface:{moved / 'tokenizer.json'}?start=none&clean=lower"
  assert (moved / "tokenizer.json").read_bytes() == content
  assert str(tmp_path) not in (moved / "weights.json").read_text()


def test_a_damaged_token_is_not_taken(tmp_path: Path) -> None:
  for token, found in (("<pad>", "<pad>"), ("<p" * 100, ""), ("a,b", ""), (7, "")):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    assert padding_token(tmp_path) == found
