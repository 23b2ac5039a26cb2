"""CLIP_benchmark gives an exported run the accuracy that our evaluator gives it, and merges our results."""

import argparse
import csv
import io
import os
from pathlib import Path
import subprocess
import sys
import tarfile

from clip_benchmark.cli import main_build
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification as theirs
from ml_collections import ConfigDict
import numpy as np
import open_clip
import PIL.Image
import torch

from declip_jax import config
from declip_jax.data.sources import open_source
from declip_jax.evaluate import evaluate
from declip_jax.weights.read import read
from declip_jax.weights.write import write

TESTS = Path(__file__).parent.parent
TEMPLATES = ("a {}.", "a photo of a {}.")


def write_shard(folder: Path, count: int) -> None:
  """Scenes of the held-out classes as a WebDataset in CLIP_benchmark's format."""
  source = open_source(f"scenes:heldout/{count}/24")
  (folder / "test").mkdir(parents=True)
  (folder / "test" / "nshards.txt").write_text("1")
  (folder / "classnames.txt").write_text("\n".join(source.classnames))
  (folder / "zeroshot_classification_templates.txt").write_text("\n".join(t.replace("{}", "{c}") for t in TEMPLATES))
  with tarfile.open(folder / "test" / "0.tar", "w") as tar:
    for index in range(count):
      sample, file = source[index], io.BytesIO()
      PIL.Image.fromarray(np.asarray(sample["image"])).save(file, "PNG")
      for suffix, data in (("png", file.getvalue()), ("cls", str(sample["label"]).encode())):
        member = tarfile.TarInfo(f"{index:04}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


@torch.no_grad()
def test_zero_shot_accuracy_is_the_same(tmp_path: Path) -> None:
  overrides = {"duration.steps": 60, "model.text.context_length": 77, "optimizer.learning_rate": 3e-3}
  command = [sys.executable, "-m", "declip_jax.train", "--config", f"{TESTS / 'tiny.py'}:clip,bare"]
  command += ["--workdir", str(tmp_path / "run"), *(f"--config.{name}={value}" for name, value in overrides.items())]
  # On one device: with more, the threads of a CPU with few cores may all wait in collectives of one such step.
  subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
  write_shard(tmp_path / "scenes", 400)
  evals = ConfigDict({"scenes": config.zero_shot(f"webdataset:{tmp_path / 'scenes' / 'test' / '*.tar'}", TEMPLATES)})
  (tmp_path / "scenes" / "test" / "classnames.txt").write_text((tmp_path / "scenes" / "classnames.txt").read_text())
  ours = evaluate(tmp_path / "run", evals=evals)
  write(read(tmp_path / "run"), tmp_path / "export", "open_clip")
  name = f"local-dir:{tmp_path / 'export'}"
  model, _, transform = open_clip.create_model_and_transforms(name)
  dataset = build_dataset(
    "wds/scenes", root=str(tmp_path / "scenes"), transform=transform, split="test", task="zeroshot_classification"
  )
  loader = torch.utils.data.DataLoader(dataset.batched(50), batch_size=None)
  tokenizer = open_clip.get_tokenizer(name)
  weights = theirs.zero_shot_classifier(model.eval(), tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
  logits, target = theirs.run_classification(model, weights, loader, "cpu", amp=False)
  best = logits.topk(5).indices == target[:, None]
  top1, top5 = best[:, 0].float().mean().item(), best.any(dim=1).float().mean().item()
  assert len(target) == ours["eval/scenes/images"] == 400
  np.testing.assert_allclose([top1, top5], [ours["eval/scenes/top1"], ours["eval/scenes/top5"]], atol=5e-4)
  (result,) = (tmp_path / "run" / "results").glob("*.json")
  main_build(argparse.Namespace(files=[str(result)], output=str(tmp_path / "all.csv")))
  with (tmp_path / "all.csv").open() as file:
    (row,) = csv.DictReader(file)
  assert (row["dataset"], row["task"], row["language"]) == ("scenes", "zeroshot_classification", "en")
  assert float(row["acc1"]) == ours["eval/scenes/top1"]
