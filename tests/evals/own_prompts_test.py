"""Tests of prompts of the user's own."""

import json
from pathlib import Path

import pytest

from declip_jax.evals.catalogue import data_set
from declip_jax.evals.own_prompts import read_prompts


def write(path: Path, contents: object) -> Path:
  path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
  return path


def test_templates(tmp_path: Path):
  for path in (
    write(tmp_path / "t.txt", "a {} here\n\nthe {c}\n"),
    write(tmp_path / "list.json", ["a {} here", "the {c}"]),
    write(tmp_path / "sets.json", {"cifar10": ["a {} here", "the {c}"], "mnist": ["{c}"]}),
    write(tmp_path / "names.json", {"vtab/cifar10": ["a {} here", "the {c}"]}),
  ):
    data = read_prompts(path, data_set("cifar10"))
    assert data.prompt_sets[0] == "own"
    assert data.prompts()[1] == ("a automobile here", "the automobile")
    assert data.prompts("openai") == data_set("cifar10").prompts("openai")


def test_prompts_of_each_class_are_matched_by_name(tmp_path: Path):
  prompts = {name.upper(): [f"{name} {{}}", "other"] for name in reversed(data_set("cifar10").classes)}
  for contents in (prompts, {"cifar10": prompts, "mnist": []}):
    data = read_prompts(write(tmp_path / "p.json", contents), data_set("cifar10"))
    assert data.prompts()[:2] == (("airplane {}", "other"), ("automobile {}", "other"))
  templates = read_prompts(write(tmp_path / "t.txt", "a {}"), data)
  assert templates.prompts()[0] == ("a airplane",)


@pytest.mark.parametrize(
  ("contents", "message"),
  [
    ("{", "not JSON"),
    ({"lion": ["a"], "dog": ["b"]}, r"p\.json.*only in the source: 'lion'; only in cifar10: 'airplane'"),
    (["no place"], "'no place'.*one {}"),
    ([], "expected a list"),
    ({"cifar10": {"cat": "a"}}, "expected a list.*cifar10"),
    (3, "expected a list"),
  ],
)
def test_wrong_files(tmp_path: Path, contents: object, message: str):
  with pytest.raises(ValueError, match=message):
    read_prompts(write(tmp_path / "p.json", contents), data_set("cifar10"))
