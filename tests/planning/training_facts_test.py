"""What results say about the training of a run."""

import json
from pathlib import Path
import shutil

from ml_collections import ConfigDict
import pytest
from tiny import FinishedRun, tiny_config

from declip_jax import config as config_lib
from declip_jax.batch_sizes import BatchSizes
from declip_jax.methods import name_of
from declip_jax.planning import training_facts as lib


def test_facts_of_a_checkpoint(
  finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  counted: list[int] = []
  recipes: set[str] = set()
  monkeypatch.setattr(lib, "cache_folder", lambda: tmp_path / "cache")
  monkeypatch.setattr(lib.flops, "step_flops", lambda _, size: counted.append(size) or 100.0 * size)
  run, config = tmp_path / "run", finished_run.config
  shutil.copytree(finished_run.workdir, run)
  (samples,) = (start.samples for start in lib.read_starts(run))
  (total,) = (samples[name] for name in config.data.train)
  for step in (6, 8):
    seen = step * config.batch_size
    found = lib.training_facts(run, step)
    recipes.add(found.pop("recipe"))
    assert found == {
      "method": "declip",
      "seed": config.seed,
      "data": {config.data.train[0]: total},
      "pairs_seen": seen,
      "unique_pairs": min(total, seen),
      "epochs": round(seen / total, 4),
      "flops": 100.0 * seen,
    }
  assert counted == [config.batch_size]  # once for both
  assert len(recipes) == 1
  start = json.loads((run / "starts.jsonl").read_text()) | {"command": ["train", "--config=slip/slip_base_25ep:data=x"]}
  (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
  assert lib.training_facts(run, 8)["config"] == "slip/slip_base_25ep"
  (run / "starts.jsonl").unlink()
  assert lib.training_facts(run, 8).keys() == {"method", "recipe", "seed", "pairs_seen", "flops"}

  def fail(*_: object) -> None:
    raise ValueError("no such term")

  monkeypatch.setattr(lib, "_step_flops", fail)
  assert "flops" not in lib.training_facts(run, 8)
  assert "no such term" in caplog.text


def test_batches_of_two_sizes_both_count(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(lib, "_step_flops", lambda _, size: 10.0 * size)
  sizes = BatchSizes(((0, 8), (5, 16)))
  assert lib._flops(finished_run.config, sizes, 7, {}) == 10 * sizes.examples(7) == 10 * (5 * 8 + 2 * 16)
  assert lib._flops(finished_run.config, sizes, 3, {}) == 10 * 3 * 8


def test_each_stage_counts_with_its_own_images_and_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(lib, "_step_flops", lambda config, size: 10.0 * size * config.data.image_size)
  config = tiny_config("clip")
  config.duration = config_lib.duration(epochs=1)
  config.stages.low = config_lib.stage(duration=config_lib.duration(epochs=0.5), image_size=8, batch_size=32)
  sizes, samples = BatchSizes(((0, 32), (4, 16))), {config.data.train[0]: 256}
  assert lib._flops(config, sizes.between(0, 3), 3, samples) == 3 * 10 * 32 * 8
  assert lib._flops(config, sizes, 6, samples) == 4 * 10 * 32 * 8 + 2 * 10 * 16 * 16
  with pytest.raises(LookupError, match=config.data.train[0]):
    lib._flops(config, sizes, 6, {})


def test_a_recipe_has_the_fields_that_are_not_default(monkeypatch: pytest.MonkeyPatch) -> None:
  config, default = tiny_config("clip"), config_lib.default
  plain = lib._recipe(config)

  def later_default(*arguments: str) -> ConfigDict:
    c = default(*arguments)
    with c.unlocked(), c.objective.clip.unlocked():
      c.data.later, c.objective.clip.later = 1, 1
      c.objective.later_term = ConfigDict({"weight": 0.0, "schedule": ()})
    return c

  with monkeypatch.context() as patch:  # fields that a later version adds
    patch.setattr(config_lib, "default", later_default)
    later = config_lib.changeable(config)
    assert lib._recipe(later) == lib._recipe(config) == plain
    later.data.later = 2
    assert lib._recipe(later) != plain
  for field, value in {"data.weak_scale": (0.1, 1.0), "objective.clip.label_smoothing": 0.1}.items():
    changed = config_lib.changeable(config)
    changed.update_from_flattened_dict({field: value})
    assert lib._recipe(changed) != plain
  config.objective.mvs.label_smoothing = 0.1
  assert lib._recipe(config) == plain  # of a term without weight


def test_stages_are_part_of_the_recipe() -> None:
  config = tiny_config("clip")
  plain = lib._recipe(config)
  config.stages.low = config_lib.stage(duration=config_lib.duration(steps=3), image_size=8)
  staged = lib._recipe(config)
  config.stages.low.duration.steps = 4
  assert plain == staged[: len(plain)] != staged == lib._recipe(config)
  config.stages.low.patch_dropout = 0.5
  assert lib._recipe(config) != staged


@pytest.mark.parametrize(
  ("command", "name"),
  [
    (["train.py", "--config=slip/slip_base_25ep:data=a", "--config.seed=1"], "slip/slip_base_25ep"),
    (["train.py", "-config", "configs/demo.py"], "demo"),
    (["train.py", "--config=mine.py", "--workdir", "demo"], ""),
    ([], ""),
  ],
)
def test_the_config_of_a_command(command: list[str], name: str) -> None:
  assert lib._config_name(command) == name


def test_methods_are_recognised_by_recipe_and_terms() -> None:
  assert name_of("clip", ["clip"]) == "clip"
  assert name_of("declip", ["nns", "clip", "mvs", "simsiam", "mlm"]) == "declip"
  assert name_of("declip", ["clip"]) == "declip_clip"
  assert name_of("filip_repo", ["filip"]) == "filip"
  assert name_of("clip", ["clip", "mine"]) == "clip+mine"
