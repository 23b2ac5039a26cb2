"""The report of a run before its first step, and on its evaluations."""

from collections import Counter
from pathlib import Path
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.mixture import Mixture
from declip_jax.data.pipeline import training_samples
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import open_source
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.reporting import opening
from declip_jax.reporting.opening import closing_lines, opening_lines, score_lines
from declip_jax.sharding import make_mesh


class FakeSource:
  name = "webdataset:/data"
  skipped = Counter({"no caption": 1200})
  left_out = Counter({".HEIC": 1500, ".jxl": 1})

  def __len__(self) -> int:
    return 12_345


def describe(start: int = 0, total_before: int = 0, source: Any = None, **groups: int) -> list[str]:
  abstract = SimpleNamespace(params={"kernel": jax.ShapeDtypeStruct((1000, 5), jnp.float32)})
  return list(
    opening_lines(
      sources=[source or FakeSource()],
      weights={"clip": 1.0, "nns": 0.2},
      recipe="declip",
      groups=groups,
      batch_size=16,
      start=start,
      total=1000,
      mesh=make_mesh(1, 1, jax.devices()[:1]),
      abstract=abstract,
      total_before=total_before,
      changes=["config.seed: 0 -> 1"] if start else [],
    )
  )


def test_a_run_describes_its_data_objective_and_devices() -> None:
  assert describe() == [
    "webdataset:/data: 12,345 samples, skipped 1,200: no caption, left out 1,501 files: 1,500 .HEIC, 1 .jxl",
    "objective 1 clip + 0.2 nns; recipe declip; 5,000 parameters",
    "1,000 steps of 16 examples on mesh data=1 x fsdp=1 (cpu)",
  ]


def test_the_parts_of_a_divided_source_are_told_apart() -> None:
  lines = [describe(source=open_source(f"{kind}:10%,5000:scenes:test/40/16"))[0] for kind in ("kept", "heldout")]
  assert lines == [
    "kept:10%,5000:scenes:test/40/16: 36 samples, all but the 4 held out of 40",
    "heldout:10%,5000:scenes:test/40/16: 4 samples, the 4 held out of 40",
  ]


def test_groups_of_heads_are_described() -> None:
  assert describe(norms=4, banks=1)[3:] == ["norms: 4 groups of 4 pairs"]


def test_a_run_that_resumes_names_its_step_and_what_has_changed() -> None:
  assert describe(200)[3:] == ["resuming from step 200", "changed since the last start: config.seed: 0 -> 1"]
  assert describe(1000) == [
    "nothing to train: this run has done all of its 1,000 steps",
    "changed since the last start: config.seed: 0 -> 1",
  ]
  assert describe(1200)[0] == "nothing to train: this run has done 1,200 steps, more than the 1,000 of its config"


def test_a_run_that_resumes_with_another_length_says_so_and_how_to_start_afresh() -> None:
  line = describe(200, total_before=200)[3]
  assert line.startswith("resuming from step 200 of a schedule that now has 1,000 steps instead of 200: ")
  assert line.endswith("to start afresh, choose another --workdir")
  assert describe(200, total_before=1000)[3] == "resuming from step 200"


@pytest.mark.parametrize(("name", "augment_on"), [("declip", "host"), ("finetune", "device")])
def test_views_are_drawn_with_what_made_them(
  name: str, augment_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  drawn: list[Any] = []
  monkeypatch.setattr(opening.pictures, "plot_views", lambda *arguments: drawn.extend(arguments))
  rendering = Rendering(16, augment_on=augment_on)
  make_views = MakeViews(RECIPES[name], Tokenizer(16), rendering, Masking(slots=3), num_classes=70)
  mixture = Mixture([open_source("scenes:train/64/24")], (1.0,), name == "declip")
  samples = training_samples(mixture, make_views.with_origin, seed=0)
  table = opening.draw_views(samples, make_views, lambda batch, step: batch, tmp_path / "views.png")
  examples, title, path, view_names, text_names = drawn
  assert path == tmp_path / "views.png"
  assert (view_names, text_names) == (RECIPES[name].image_views, RECIPES[name].text_views)
  unlisted = title.partition("; not listed: ")[2].split(", ")
  finetuning = ["colours", "blur and flips of the train step", "mixing with another image", "RandAugment", "erasing"]
  assert unlisted == (finetuning if name == "finetune" else [""])
  plain = training_samples(mixture, make_views, seed=0)
  for number, example in enumerate(examples):
    np.testing.assert_array_equal(example.views, plain[number]["image"])  # those of the training
    [original] = example.originals
    assert original.shape == (24, 24, 3)
    for (of, (top, left, height, width)), change in zip(example.boxes, example.changes, strict=True):
      assert of == 0
      assert 0 <= top <= top + height <= 1
      assert 0 <= left <= left + width <= 1
      assert change.split(", ")[0] == f"crop {height * width:.0%}"
      assert (change.count(",") == 0) or augment_on == "host"
  if name == "finetune":
    assert table == ""
    return
  assert all(example.texts[0] in table for example in examples)
  notes = [dict(zip(text_names, example.notes, strict=True)) for example in examples]
  assert all(own["augmented"].split(",")[0] in RECIPES[name].text_operations for own in notes)
  masked = [int(plain[number]["mlm_weight"].sum()) for number in range(len(examples))]
  assert [own["masked"] for own in notes] == [f"{count} to predict, in brackets" if count else "" for count in masked]
  marked = [dict(zip(text_names, example.texts, strict=True))["masked"].count("[") for example in examples]
  assert marked == masked
  for example, own in zip(examples, notes, strict=True):
    assert own["augmented"].endswith("unchanged") == (example.texts[0] == example.texts[1])


def test_tokens_to_predict_are_marked_by_what_replaced_them() -> None:
  tokenizer = Tokenizer(16)
  ids = tokenizer(["a big dog on a red mat"])[0].tolist()
  targets = {3: ids[3], 6: ids[6], 7: ids[7]}  # dog, red, mat
  ids[3], ids[6] = tokenizer.mask, ids[2]
  assert opening._marked(ids, targets, tokenizer) == "a big [mask: dog] on a [big: red] [mat]"
  assert opening._marked(ids, {}, tokenizer) == tokenizer.decode(ids)


def test_each_evaluator_has_a_line() -> None:
  results = {"eval/heldout/top1": 0.5, "eval/retrieval/images": 20, "eval/heldout/top5": 0.75}
  assert list(score_lines(3000, results)) == [
    "step 3,000  heldout: top1 50.0%  top5 75.0%",
    "step 3,000  retrieval: images 20",
  ]


def test_a_run_ends_with_its_scores_beside_chance(tmp_path: Path) -> None:
  final = {
    "loss": 1.0,
    "eval/mine/top1": 0.5,
    "eval/mine/majority_share": 0.125,
    "eval/pairs/image_to_text_r10": 0.25,
    "eval/pairs/text_to_image_r10": 0.75,
    "eval/pairs/images": 400,
    "eval/pairs/texts": 400,
    "eval/suite/pets": 0.5,
  }
  commands = ["# export its weights", "python -m declip_jax.export --workdir x"]
  mine, pairs, *others = closing_lines(tmp_path, final, ["pairs"], commands)
  assert others == ["commands to type next:", *commands]
  assert re.findall(r"[\d.]+%", mine) == ["50.0%", "12.5%"]
  assert re.findall(r"[\d.]+%", pairs) == ["25.0%", "75.0%", "2.5%", "2.5%"]
  assert "chance" not in "".join(closing_lines(tmp_path, final, [], commands))
  (tmp_path / "index.html").touch()
  page, *_ = closing_lines(tmp_path, {}, [], commands)
  assert page.endswith(str(tmp_path / "index.html"))
  assert "without --steps" in [*closing_lines(tmp_path, {}, [], commands, is_try=True)][-1]
