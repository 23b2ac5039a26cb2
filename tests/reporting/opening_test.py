"""The report of a run before its first step, and on its evaluations."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from declip_jax.reporting.opening import opening_lines, score_lines
from declip_jax.sharding import make_mesh


class FakeSource:
  name = "webdataset:/data"
  skipped = Counter({"no caption": 1200})
  left_out = Counter({".HEIC": 1500, ".jxl": 1})

  def __len__(self) -> int:
    return 12_345


def describe(start: int = 0, **groups: int) -> list[str]:
  abstract = SimpleNamespace(params={"kernel": jax.ShapeDtypeStruct((1000, 5), jnp.float32)})
  return list(
    opening_lines(
      sources=[FakeSource()],
      weights={"clip": 1.0, "nns": 0.2},
      recipe="declip",
      groups=groups,
      batch_size=16,
      start=start,
      total=1000,
      mesh=make_mesh(1, 1, jax.devices()[:1]),
      abstract=abstract,
      changes=["config.seed: 0 -> 1"] if start else [],
    )
  )


def test_a_run_describes_its_data_objective_and_devices() -> None:
  assert describe() == [
    "webdataset:/data: 12,345 samples, skipped 1,200: no caption, left out 1,501 files: 1,500 .HEIC, 1 .jxl",
    "objective 1 clip + 0.2 nns; recipe declip; 5,000 parameters",
    "1,000 steps of 16 examples on mesh data=1 x fsdp=1 (cpu)",
  ]


def test_groups_of_heads_are_described() -> None:
  assert describe(norms=4, banks=1)[3:] == ["norms: 4 groups of 4 pairs"]


def test_a_run_that_resumes_names_its_step_and_what_has_changed() -> None:
  assert describe(200)[3:] == ["resuming from step 200", "changed since the last start: config.seed: 0 -> 1"]
  assert "1,000" in describe(1000)[3]


def test_each_evaluator_has_a_line() -> None:
  results = {"eval/heldout/top1": 0.5, "eval/retrieval/images": 20, "eval/heldout/top5": 0.75}
  assert list(score_lines(3000, results)) == [
    "step 3,000  heldout: top1 50.0%  top5 75.0%",
    "step 3,000  retrieval: images 20",
  ]
