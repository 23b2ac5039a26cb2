"""Tests of model cards and uploads, by huggingface_hub's client and a server on loopback."""

from collections.abc import Callable
import os
from pathlib import Path
import subprocess
import sys

from hub_server import HubServer, Model
import huggingface_hub
import pytest
import references as reference
from tiny import tiny_config

import declip_jax
from declip_jax import model_card
from declip_jax.evals import results
from declip_jax.evals.feature_cache import tree_hash
from declip_jax.weights import hub
from declip_jax.weights.read import Weights, from_state_dict, read
from declip_jax.weights.write import write

NAME = "org/model"
FACTS = {
  "method": "declip",
  "config": "demo",
  "seed": 3,
  "data": {"table:a|b.csv": 1000},
  "pairs_seen": 2048,
  "epochs": 2.048,
  "flops": 1.5e12,
  "init_from": "hf-hub:org/other",
}


def _write_results(weights: Weights, folder: Path) -> None:
  """Results of these weights, and of others."""
  view = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(weights.view).items()}
  own_hash = tree_hash({"params": weights.params, "collections": weights.collections})
  for dataset, kind, metrics, about in (
    ("vtab/pets", "zero_shot", {"top1": 0.25, "top5": 0.5}, {"hash": own_hash}),
    ("coco", "retrieval", {"mean_recall": 0.125, "queries": 8}, {"hash": own_hash}),
    ("vtab/flowers", "zero_shot", {"top1": 0.75}, {"hash": "of another step"}),
  ):
    ours = {"kind": kind, "headline": next(iter(metrics)), "metrics": metrics, "intervals": {"top1": (0.2, 0.3)}}
    ours |= {"weights": about, "view": view}
    results.write(folder, results.Result(dataset, "m", "step-3", f"task_of_{kind}", metrics, ours), {})


@pytest.fixture(scope="module")
def weights() -> Weights:
  settings = reference.TOLD | {"image.heads": 4, "text.heads": 2}
  return from_state_dict(reference.below(reference.load("hf_clip"), "sd/"), settings)


def test_a_card_has_the_training_and_the_results_of_the_run(
  weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  exported = weights._replace(step=3)
  (tmp_path / "checkpoints").mkdir()
  _write_results(exported, tmp_path / "results")
  monkeypatch.setattr(model_card, "training_facts", lambda *_: FACTS)
  notes = ["omitted: the heads that only training uses (bank)"]
  text = model_card.make_card(model_card.Export(exported, tmp_path, "open_clip", NAME, notes, "mit"))
  card = huggingface_hub.ModelCard(text)
  data = card.data.to_dict()
  assert (data["library_name"], data["pipeline_tag"]) == ("open_clip", "zero-shot-image-classification")
  assert (data["license"], data["tags"]) == ("mit", ["clip", "declip", "declip_jax"])
  scores = {(one.dataset_name, one.task_type, one.metric_type): one.metric_value for one in card.data.eval_results}
  assert scores == {
    ("vtab/pets", "zero-shot-image-classification", "accuracy"): 0.25,
    ("vtab/pets", "zero-shot-image-classification", "top5"): 0.5,
    ("coco", "task_of_retrieval", "mean_recall"): 0.125,
  }
  assert f"exported by declip_jax {declip_jax.__version__}." in card.text
  for line in (
    "| vtab/pets | zero shot | top1 25.0% [20.0%, 30.0%] |",
    "| started from | `hf-hub:org/other` |",
    "| data | `table:a&#124;b.csv` (1,000 samples) |",
    "| steps | 3 |",
    "| pairs seen | 2,048 |",
    f"* {notes[0]}",
    f'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{NAME}")',
  ):
    assert line in card.text.splitlines()


def test_other_weights_have_a_card_without_training(weights: Weights, tmp_path: Path) -> None:
  text = model_card.make_card(model_card.Export(weights, tmp_path / "model.pt", "huggingface", NAME))
  card = huggingface_hub.ModelCard(text)
  assert card.data.to_dict() == {
    "library_name": "transformers",
    "pipeline_tag": "zero-shot-image-classification",
    "tags": ["clip", "declip_jax"],
  }
  assert text.startswith("---\n# license: add the name of a licence, see https://")  # for people
  assert "## Training" not in text
  assert f'CLIPModel.from_pretrained("{NAME}")' in text


def test_an_export_is_uploaded_and_read_again(hub_server: HubServer, weights: Weights, tmp_path: Path) -> None:
  write(weights, tmp_path / "out", "open_clip")
  (tmp_path / "out" / "README.md").write_text("ours")
  repository = hub.Repository(NAME)
  assert hub.push(tmp_path / "out", repository) == [f"uploaded to {hub_server.url}/{NAME}"]
  model = hub_server.models[NAME]
  assert model.visibility == "private"
  assert model.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  assert read(f"hf-hub:{NAME}").view == weights.view
  model.files["README.md"] = b"theirs"
  assert hub.push(tmp_path / "out", repository, public=True)[0].startswith(f"README.md of hf-hub:{NAME} was kept")
  assert (model.files["README.md"], model.visibility) == (b"theirs", "private")
  hub.push(tmp_path / "out", hub.Repository("org/public"), public=True)
  assert hub_server.models["org/public"].visibility == "public"


def test_uploads_that_are_not_possible_are_one_line(
  hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with pytest.raises(ValueError, match=r"^hf-hub:org/model@v1: an upload is a commit to the main branch"):
    hub.parse_destination("hf-hub:org/model@v1")
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  with pytest.raises(PermissionError, match=r"^hf-hub:org/model: nobody is logged in: log in by hf auth login"):
    hub.parse_destination("hf-hub:org/model")
  hub_server.token = "another"
  with pytest.raises(PermissionError, match=r"does not let this token write there \(status 401\).* may write to org$"):
    hub.push(tmp_path, hub.Repository(NAME))
  hub_server.fails = True
  with pytest.raises(OSError, match="^hf-hub:org/model: cannot reach"):
    hub.push(tmp_path, hub.Repository(NAME))


@pytest.mark.slow
def test_a_run_is_pushed_and_read_by_commands(save_run: Callable[..., Path], tmp_path: Path) -> None:
  run, server = save_run(tiny_config("declip")), HubServer()
  server.token = "hf_secret"
  environment = {
    "HF_ENDPOINT": server.url,
    "HF_HOME": str(tmp_path / "home"),
    "HF_TOKEN": server.token,
    "HF_HUB_DISABLE_XET": "1",
  }
  command = [sys.executable, "-m", "declip_jax.export"]

  def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=os.environ | environment)

  with server.running():
    pushed = call(f"--workdir={run}", "--format=open_clip", f"--push=hf-hub:{NAME}")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1] == f"uploaded to {server.url}/{NAME}"
    assert isinstance(server.models[NAME], Model)
    assert "| method | `declip` |" in server.models[NAME].files["README.md"].decode().splitlines()
    read_again = call(f"--weights=hf-hub:{NAME}", "--format=huggingface", f"--output={tmp_path / 'out'}")
    assert read_again.returncode == 0, read_again.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    wrong = call(f"--weights=hf-hub:{NAME}x", "--format=orbax", f"--output={tmp_path / 'wrong'}")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
    assert wrong.stderr.startswith(f"error: --weights: hf-hub:{NAME}x: {server.url} has no model {NAME}x")
