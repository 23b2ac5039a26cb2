"""`declip_jax.reporting.symptoms`: what is reported, when, and that healthy runs have none."""

from collections.abc import Mapping
import math
from pathlib import Path
import re

import pytest

from declip_jax import config, config_files
from declip_jax.reporting.symptoms import LINES, NAMES, PAGE, Facts, Symptoms

ROOT = Path(__file__).parents[2]
FACTS = Facts(batch_size=256, warmup=100, total=10_000, scales=(1.0, 100.0))
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
  assert f"{PAGE}#{name.replace('_', '-')}" in message
  (value,) = [value for value in changes.values() if value != 0.04]
  shown = [f"{value:.2f}", f"{value:.0%}", f"{value:.1%}", f"{value:.2%}", f"{value:.3g}"]
  assert any(text in message for text in shown)


def test_a_fall_of_the_accuracy_is_reported_from_its_best() -> None:
  watch, messages = Symptoms(FACTS), []
  for index in range(2 * LINES):
    found, new = watch.check(2000 + index, HEALTHY | {"image_to_text_accuracy": 0.3 if index < LINES else 0.2})
    messages += new
  assert (found, len(messages)) == ({"warning/accuracy_falls": 1.0}, 1)
  assert "from 30.0% to 20.0%" in messages[0]


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


def test_the_page_has_a_section_and_a_row_for_each_symptom() -> None:
  text = (ROOT / PAGE).read_text()
  sections = [title.lower().replace(" ", "_") for title in re.findall(r"^## (.*)$", text, re.MULTILINE)]
  assert sections == [*NAMES]
  assert re.findall(r"^\| \[`(\w+)`\]\(#([\w-]+)\)", text, re.MULTILINE) == [
    (name, name.replace("_", "-")) for name in NAMES
  ]
  known = {name for name, _ in config_files.fields(config.default())}
  named = set(re.findall(r"config\.([a-z][\w.]*\w)", text)) - {"objective.TERM.weight"}
  assert len(named) > 5
  assert named <= known
