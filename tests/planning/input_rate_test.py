"""Tests of `declip_jax.planning.input_rate`: its figures equal docs/results.md, for every recipe."""

from pathlib import Path
import re

from declip_jax.data.recipes import RECIPES
from declip_jax.planning.input_rate import RATES, SIMILAR, measured_rate

ROOT = Path(__file__).parents[2]


def test_rates_are_those_of_recipes_that_exist():
  assert set(RATES) | set(SIMILAR) <= set(RECIPES)
  assert set(SIMILAR.values()) <= set(RATES)
  assert measured_rate("simclr", "exact", "host") == ("declip", RATES["declip"][1])
  assert measured_rate("clip", "exact", "device") == ("clip", RATES["clip"][2])
  assert measured_rate("new", "fast", "host") == ("new", None)


def test_rates_equal_the_results():
  results = (ROOT / "docs" / "results.md").read_text()
  table = results.partition("500x375 JPEGs of 58 kB")[2].partition("flickr8k, 128")[0]
  for name, rates in RATES.items():
    cells = [cell.strip() for cell in re.search(rf"^\| {name} \|.*", table, re.MULTILINE)[0].split("|")]
    assert tuple(map(int, cells[4:7])) == rates
