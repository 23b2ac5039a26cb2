"""The matrix of docs/released_weights.md for the towers that no other test here has: models built by their own code."""

import json
from pathlib import Path
import sys

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import open_clip
from released_weights import READ, OpenClip, Result, of_class, of_training, preprocessing

from declip_jax.weights import read as read_lib


@pytest.mark.filterwarnings("ignore:.*decoder of captions")
@pytest.mark.parametrize(
  ("name", "tag", "status"),
  [
    ("convnext_large_d", "laion2b_s26b_b102k_augreg", "equal"),
    ("ViT-SO400M-16-SigLIP-i18n-256", "webli", "equal"),  # without a projection of texts
    ("EVA01-g-14", "laion400m_s11b_b41k", "equal"),
    ("EVA02-E-14", "laion2b_s4b_b115k", "equal"),
    ("MobileCLIP2-L-14", "dfndr2b", "equal"),
    ("coca_ViT-B-32", "laion2b_s13b_b90k", "remark"),
  ],
)
def test_released_models_of_open_clip(name: str, tag: str, status: str) -> None:
  about = open_clip.get_pretrained_cfg(name, tag)
  assert about
  found = OpenClip(name, bool(about.get("quick_gelu"))).result(preprocessing(about))
  assert found.status == status, json.dumps(found)


def test_a_wrong_guess_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
  assert of_training("MobileCLIP2-L-14") == Result("remark", remark="guesses wrongly text.causal")
  monkeypatch.setattr(read_lib, "_assumptions", lambda *_: ["the file does not say everything"])
  assert of_training("MobileCLIP2-L-14") == Result("WRONG", remark="differs without a remark: text.causal")


@pytest.mark.parametrize("name", READ)
def test_classes_of_transformers(name: str) -> None:
  (found,) = of_class(name)
  assert found.status == ("remark" if name in ("CLIPTextModel", "CLIPVisionModel") else "equal"), json.dumps(found)
