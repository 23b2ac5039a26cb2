"""`declip_jax.reporting.symptoms`: what is reported, when, and that healthy runs have none."""

from collections.abc import Mapping
import dataclasses
from functools import cache
import json
import math
from pathlib import Path
import re
import shlex

from clips import describe_any
import jax
import pytest

from declip_jax import ADDRESS, build, config, config_files
from declip_jax.build import stage_steps
from declip_jax.planning import choose
from declip_jax.reporting.chance import chance_losses
from declip_jax.reporting.symptoms import NAMES, PAGE, Facts, Symptoms
from declip_jax.stages import plan_stages
from declip_jax.weights import describe

ROOT = Path(__file__).parents[2]
FACTS = Facts(batch_size=256, warmup=100, total=10_000, scales=(1.0, 100.0))
LINES = FACTS.lines
HEALTHY = {
  "loss": 3.4,
  "loss/clip": 2.9,
  "loss/simclr": 4.0,
  "share/clip": 0.6,
  "share/simclr": 0.4,
  "temperature": 0.05,
  "diagnostics/image/deviation": 0.9,
  "image_to_text_accuracy": 0.3,
  "skipped_total": 3.0,
  "time/data": 0.05,
}


def reported(changes: Mapping[str, float], step: int = 2000, facts: Facts = FACTS) -> tuple[set[str], list[str]]:
  """The symptoms of the last line, and all messages, of a run with `changes` in all its lines."""
  watch, messages, found = Symptoms(facts), [], {}
  for index in range(2 * LINES):
    found, new = watch.check(step + index, HEALTHY | changes)
    messages += new
  return {name.removeprefix("warning/") for name in found}, messages


@pytest.mark.parametrize(
  ("name", "changes", "step"),
  [
    ("collapsed", {"diagnostics/image/deviation": 0.05}, 2000),
    ("at_chance", {"loss/clip": math.log(256)}, 2000),
    ("at_chance", {"loss/simclr": math.log(511)}, 2000),
    ("at_chance", {"diagnostics/image_text/image_to_text_accuracy": 1 / 256}, 2000),
    ("temperature_at_bound", {"temperature": 0.01}, 500),
    ("temperature_at_bound", {"temperature": 1.0}, 2000),
    ("one_term", {"share/clip": 0.96, "share/simclr": 0.04}, 2000),
    ("waiting", {"time/data": 0.25}, 2000),
  ],
)
def test_each_symptom_is_reported_once_with_its_value(name: str, changes: dict[str, float], step: int) -> None:
  found, (message,) = reported(changes, step)
  assert found == {name}
  assert message.endswith(f"; see {ADDRESS}/blob/main/{PAGE}#{name.replace('_', '-')}")
  (value,) = [value for value in changes.values() if value != 0.04]
  shown = [f"{value:.2f}", f"{value:.0%}", f"{value:.1%}", f"{value:.2%}", f"{value:.3g}"]
  assert any(text in message for text in shown)


def test_a_fall_of_the_accuracy_is_reported_from_its_best() -> None:
  watch, messages = Symptoms(FACTS), []
  for index in range(2 * LINES):
    found, new = watch.check(2000 + index, HEALTHY | {"image_to_text_accuracy": 0.3 if index < LINES else 0.15})
    messages += new
  assert (found, len(messages)) == ({"warning/accuracy_falls": 1.0}, 1)
  assert "from 30.0% to 16.5%" in messages[0]


def test_skipped_steps_are_counted_over_the_lines() -> None:
  watch, messages = Symptoms(FACTS), []
  for index in range(2 * LINES):
    found, new = watch.check(2000 + index, HEALTHY | {"skipped_total": 3.0 + max(0, index - LINES)})
    messages += new
  assert (found, len(messages)) == ({"warning/skipped": 1.0}, 1)


@pytest.mark.parametrize(
  ("changes", "step"),
  [
    ({}, 2000),
    ({"loss/clip": math.log(256), "temperature": 1.0}, 150),  # soon after the warm-up
    ({"temperature": 0.01}, 2000),  # late, as in many good runs
    ({"loss/clip": 0.97 * math.log(256)}, 2000),
    ({"loss/clip": math.nan, "diagnostics/image/deviation": math.nan}, 2000),
    ({"image_to_text_accuracy": 0.25, "time/data": 0.19}, 2000),
  ],
)
def test_what_is_healthy_or_too_early_is_not_reported(changes: dict[str, float], step: int) -> None:
  assert reported(changes, step) == (set(), [])


def test_one_line_or_one_term_is_no_symptom() -> None:
  watch = Symptoms(FACTS)
  alone = {"share/clip": 1.0, "loss/clip": 1.0}
  for index in range(3 * LINES):
    assert watch.check(2000 + index, alone | ({"time/data": 1.0} if index % LINES == 0 else {})) == ({}, [])


def test_lines_before_a_roll_back_do_not_count() -> None:
  watch = Symptoms(FACTS)
  broken = {"diagnostics/image/deviation": 0.0}
  for index in range(LINES - 1):
    watch.check(2000 + index, broken)
  watch.roll_back(1000)
  assert watch.check(2001, broken) == ({}, [])


def test_all_that_offend_at_a_time_are_named_in_one_line() -> None:
  changes = {
    "diagnostics/image/deviation": 0.05,
    "diagnostics/text/deviation": 0.01,
    "diagnostics/other/deviation": 0.5,
  }
  _, (message,) = reported(changes)
  assert "the features of image (deviation 0.05) and text (deviation 0.01) are almost equal" in message
  _, (message,) = reported({"loss/clip": math.log(256), "loss/simclr": math.log(511), "loss/nns": math.log(256)})
  assert "the loss of clip (5.55), the loss of nns (5.55) and the loss of simclr (6.24) are at chance" in message
  assert "captions" in message
  assert "captions" not in reported({"loss/simclr": math.log(511)})[1][0]


def test_the_first_line_and_a_noisy_accuracy_are_not_symptoms() -> None:
  """Readers start before the first line; and an accuracy of few samples has to fall further."""
  few = dataclasses.replace(FACTS, total=150, warmup=10, log_every=5)
  for facts, accuracy, falls in ((few, 0.19, True), (dataclasses.replace(few, batch_size=32), 0.19, False)):
    watch, messages = Symptoms(facts), []
    for index in range(1, 20):
      values = {"time/data": 1.0 if index == 1 else 0.0, "image_to_text_accuracy": 0.4 if index < 15 else accuracy}
      messages += watch.check(5 * index, HEALTHY | values)[1]
    assert ["fallen" in message for message in messages] == [True] * falls


@cache
def facts_of(name: str, pairs: int, steps: int | None = None) -> Facts:
  """The facts of a run of a config on this many pairs, or of a try of it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(describe, "describe", describe_any)
    patch.setattr(choose, "estimate", lambda config, built: choose.Estimate(0.0, 1.0))  # all batches fit into memory
    c = choose.choose(config_files.load(name), pairs, jax.devices()[:1])
  c = choose.shortened(c, steps, pairs) if steps else c
  return build.make_facts(c, build.to_steps(c, pairs))


PRETRAIN = "pretrain:method=slip,architecture=ViT-Nano/8@32px"
RUNS = [
  (PRETRAIN, 1025, None),
  (PRETRAIN, 40_000, None),
  (PRETRAIN, 10**6, None),
  (PRETRAIN, 1025, 100),
  ("demo:method=slip", 100_000, None),
  ("demo:method=slip", 100_000, 100),
  ("finetune_pairs:init=runs/clip", 300, None),
  ("finetune_pairs:init=runs/clip", 8000, None),
  ("finetune_pairs:init=runs/clip", 300, 100),
]


def broken(name: str, facts: Facts, index: int) -> dict[str, float]:
  """What the line with this index has if a run is broken from the start, or after its first lines."""
  return {
    "collapsed": {"diagnostics/image/deviation": 0.02},
    "at_chance": {"loss/clip": chance_losses(facts.batch_size)["clip"]},
    "temperature_at_bound": {"temperature": 1 / facts.scales[1 if facts.is_fresh else 0]},
    "one_term": {"share/clip": 0.99, "share/simclr": 0.01},
    "skipped": {"skipped_total": 5.0 * index},
    "waiting": {"time/data": 0.5},
    "accuracy_falls": {"image_to_text_accuracy": 0.5 if index < facts.lines else 0.01},
  }[name]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_broken_from_the_start_says_so_in_its_first_quarter(
  name: str, run: tuple[str, int, int | None]
) -> None:
  facts = facts_of(*run)
  watch = Symptoms(facts)
  for index, step in enumerate(range(facts.every, facts.total, facts.every)):
    if messages := watch.check(step, HEALTHY | broken(name, facts, index))[1]:
      break
  (message,) = messages
  assert message.startswith(f"warning: step {step}: ")
  assert f"#{name.replace('_', '-')}" in message
  assert step <= (60 if run[2] == 100 else facts.total / 4)


def recorded(name: str) -> dict[int, dict[str, float]]:
  """The metrics of a healthy run by their steps, of demo:method=slip with 64 pairs per step."""
  text = (ROOT / "tests" / "fixtures" / "healthy_runs" / name).read_text()
  return {line.pop("step"): line for line in map(json.loads, text.splitlines())}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_healthy_run_prints_no_warning(run: tuple[str, int, int | None]) -> None:
  """Weights that have learned go on as in the second half of the recorded run; a longer run repeats its last line."""
  facts = dataclasses.replace(facts_of(*run), batch_size=64)
  metrics = recorded("try.jsonl" if facts.is_fresh and run[2] == 100 else "whole.jsonl")
  before, apart = 0 if facts.is_fresh else max(metrics) // 2, min(metrics)
  watch, count = Symptoms(facts), 0
  for step in range(facts.every, min(facts.total, 3000) + 1, facts.every):
    line = metrics[min(max((before + step) // apart * apart, apart), max(metrics))]
    assert watch.check(step, line) == ({}, []), step
    count += 1
  assert count >= 20


def test_weights_may_start_with_the_lowest_temperature() -> None:
  facts = facts_of("finetune_pairs:init=runs/clip", 300)
  watch = Symptoms(facts)
  for step in range(facts.every, facts.total, facts.every):
    assert watch.check(step, HEALTHY | {"temperature": 0.01}) == ({}, [])


def test_a_later_stage_counts_from_its_own_start() -> None:
  c = config_files.load("demo:method=slip")
  c.stages.first = config.stage(duration=config.duration(steps=600))
  last = stage_steps(plan_stages(c, 100_000)[-1], 100_000)
  facts = build.make_facts(c, last)
  assert (facts.first, facts.length, facts.warmup, facts.is_fresh) == (600, 400, 650, False)
  assert (facts.grace, facts.early) == (670, 0)


def test_the_page_has_a_section_and_a_row_for_each_symptom() -> None:
  text = (ROOT / PAGE).read_text()
  sections = [title.lower().replace(" ", "_") for title in re.findall(r"^## (.*)$", text, re.MULTILINE)]
  assert sections == [*NAMES, "broken_on_purpose"]
  assert re.findall(r"^\| \[`(\w+)`\]\(#([\w-]+)\)", text, re.MULTILINE) == [
    (name, name.replace("_", "-")) for name in NAMES
  ]
  known = {name for name, _ in config_files.fields(config.default())}
  named = set(re.findall(r"config\.([a-z][\w.]*\w)", text)) - {"objective.TERM.weight"}
  assert len(named) > 5
  assert named <= known


def test_the_page_has_a_broken_run_for_each_symptom_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import symptoms as benchmark

  text = (ROOT / PAGE).read_text().partition("## Broken on purpose")[2]
  assert f"{benchmark.COMMAND}\n" in text
  printed = {one.name: one for one in benchmark.warnings(text)}
  rows = {cells[0]: cells[1:] for cells in re.findall(r"^\| (\w+) \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)[1:]}
  assert [*rows] == [*benchmark.RUNS] == [benchmark.HEALTHY, *NAMES]
  assert rows.pop(benchmark.HEALTHY) == ("", "none", "")
  for name, (flags, found, steps) in rows.items():
    assert flags == f"`{shlex.join(benchmark.RUNS[name])}`"
    warned = dict(zip(re.findall(r"`(\w+)`", found), map(int, steps.split(", ")), strict=True))
    assert warned[name] == printed[name].step
    assert benchmark.is_as_meant(name, [printed[name]])
    assert not benchmark.is_as_meant(name, [])
    facts = facts_of("demo:method=slip", 100_000)
    watch, messages = Symptoms(facts), []
    for index, step in enumerate(range(facts.every, facts.total, facts.every)):
      messages += watch.check(step, HEALTHY | broken(name, facts, index))[1]
    assert messages[0].rpartition(": ")[2] == printed[name].line.rpartition(": ")[2]  # remedy and address
  assert not benchmark.is_as_meant(benchmark.HEALTHY, [*printed.values()])
