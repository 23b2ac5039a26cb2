"""CLIP_benchmark gives an exported run the numbers that our evaluators give it, reads and writes the same folders, and
merges our results."""

import argparse
import csv
import io
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

from clip_benchmark.cli import main_build
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.webdataset_builder import convert_dataset, convert_retrieval_dataset
from ml_collections import ConfigDict
import numpy as np
import open_clip
import PIL.Image
import pytest
import torch

from declip_jax import config
from declip_jax.data.sources import open_source
from declip_jax.evals.data_files import Splits
from declip_jax.evals.suites import make_jobs
from declip_jax.evaluate import evaluate
from declip_jax.weights.read import read
from declip_jax.weights.write import write

TESTS = Path(__file__).parent.parent
TEMPLATES = ("a {}.", "a photo of a {}.")
KINDS = ("classification", "multilabel", "retrieval")
# CLIP_benchmark converts data sets in eight processes, and does not say that its shards keep their order.
pytestmark = [
  pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
  pytest.mark.filterwarnings("ignore:WebDataset.*shardshuffle:UserWarning"),
]
SCENES = open_source("scenes:heldout/400/24")


class Images(list):
  """Pairs of an encoded image and what belongs to it, as CLIP_benchmark converts them."""

  classes = list(SCENES.classnames)
  templates = [text.replace("{}", "{c}") for text in TEMPLATES]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A trained run with two towers, of text a context as long as open_clip's."""
  workdir = tmp_path_factory.mktemp("clip") / "run"
  overrides = {"duration.steps": 60, "model.text.context_length": 77, "optimizer.learning_rate": 3e-3}
  command = [sys.executable, "-m", "declip_jax.train", "--config", f"{TESTS / 'tiny.py'}:clip,bare"]
  command += ["--workdir", str(workdir), *(f"--config.{name}={value}" for name, value in overrides.items())]
  # On one device: with more, the threads of a CPU with few cores may all wait in collectives of one such step.
  subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
  write(read(workdir), workdir / "export", "open_clip")
  return workdir


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
  """Scenes in CLIP_benchmark's layout, written by itself, by kind: class, two labels, or one of different captions."""
  place, samples = tmp_path_factory.mktemp("folders"), [SCENES[row] for row in range(400)]
  images, labels = [png(sample["image"]) for sample in samples], [sample["label"] for sample in samples]
  by_caption = {sample["captions"][0]: image for sample, image in zip(samples, images, strict=True)}
  targets = torch.eye(len(SCENES.classnames), dtype=torch.int64)[torch.tensor(labels)]
  common = {"transform": None, "image_format": "png", "verbose": False}
  convert_dataset(Images(zip(images, labels, strict=True)), "test", place / "classification", **common)
  several = Images(zip(images, targets | targets.roll(1, dims=0), strict=True))
  convert_dataset(several, "test", place / "multilabel", multilabel=True, **common)
  pairs = [(image, [caption]) for caption, image in by_caption.items()]
  convert_retrieval_dataset(pairs, "test", place / "retrieval", **common)
  return {kind: place / kind for kind in KINDS}


def png(pixels: Any) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(np.asarray(pixels)).save(file, "PNG")
  return file.getvalue()


@torch.no_grad()
def theirs(export: Path, root: Path, kind: str) -> dict[str, float]:
  """CLIP_benchmark's metrics. Those of a classification are computed here: its own `accuracy` needs NumPy below 2.4."""
  name, task = f"local-dir:{export}", f"zeroshot_{'retrieval' if kind == 'retrieval' else 'classification'}"
  model, _, transform = open_clip.create_model_and_transforms(name)
  tokenizer = open_clip.get_tokenizer(name)
  dataset = build_dataset(f"wds/{kind}", root=str(root), transform=transform, split="test", task=task)
  loader = torch.utils.data.DataLoader(dataset.batched(50), batch_size=None)
  if kind == "retrieval":
    return zeroshot_retrieval.evaluate(model.eval(), loader, tokenizer, "cpu", amp=False)
  names, templates = dataset.classes, dataset.templates
  weights = zeroshot_classification.zero_shot_classifier(model.eval(), tokenizer, names, templates, "cpu", amp=False)
  logits, target = zeroshot_classification.run_classification(model, weights, loader, "cpu", amp=False)
  assert len(target) == 400
  if kind == "multilabel":  # of probabilities, which images have in common: it ranks logits, which they have not
    scores = zeroshot_classification.average_precision_per_class(logits.softmax(dim=1), target)
    return {"mean_average_precision": scores.mean().item()}
  best = logits.topk(5).indices == target[:, None]
  return {"acc1": best[:, 0].float().mean().item(), "acc5": best.any(dim=1).float().mean().item()}


def built(results: Path, place: Path) -> list[dict[str, str]]:
  """The table that `clip_benchmark build` makes of our results."""
  main_build(argparse.Namespace(files=[str(results)], output=str(place)))
  with place.open() as file:
    return [*csv.DictReader(file)]


def test_folders_of_all_kinds_evaluate_alike(run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
  data = {f"own/{kind}": Splits(f"clip_benchmark:{folder}") for kind, folder in folders.items()}
  jobs, remarks = make_jobs(data, tasks=("zero_shot", "retrieval"))
  assert not remarks
  evaluate(None, weights=run / "export", jobs=jobs, output=tmp_path / "results")
  rows = {row["dataset"]: row for row in built(tmp_path / "results", tmp_path / "all.csv")}
  assert sorted(rows) == sorted(data)
  for kind, folder in folders.items():
    row, expected = rows[f"own/{kind}"], theirs(run / "export", folder, kind)
    assert row["task"] == f"zeroshot_{'retrieval' if kind == 'retrieval' else 'classification'}"
    assert row["language"] == "en"
    assert expected
    for name, value in expected.items():
      assert float(row[name]) == pytest.approx(value, abs=5e-4), f"{kind}: {name}"


def test_tars_in_its_layout_are_a_webdataset(run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
  shards = f"webdataset:{folders['classification'] / 'test' / '*.tar'}"
  evals = ConfigDict({"scenes": config.zero_shot(shards, TEMPLATES)})
  ours = evaluate(run, evals=evals)
  expected = theirs(run / "export", folders["classification"], "classification")
  assert ours["eval/scenes/images"] == 400
  assert ours["eval/scenes/top1"] == pytest.approx(expected["acc1"], abs=5e-4)
  (row,) = built(run / "results", tmp_path / "all.csv")
  assert row["dataset"] == "scenes"
  assert float(row["acc1"]) == ours["eval/scenes/top1"]
