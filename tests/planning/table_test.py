"""Tests of `declip_jax.planning.table`."""

import dataclasses
import json
import re

from declip_jax.planning.report import Report
from declip_jax.planning.search import Largest
from declip_jax.planning.table import format_bytes, table


def test_the_table_shows_the_figures_of_the_json_report(report: Report):
  largest = Largest(pairs=8, batch_size=16, tried=[(4, 2.0**28), (8, 2.0**29), (16, None)])
  report = dataclasses.replace(report, largest=largest)
  written = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
  text = "\n".join(table(report))
  assert max(map(len, text.splitlines())) < 160
  assert set(written["memory"]) >= {"parameters", "optimizer_state", "temporaries", "peak"}
  for name, size in written["memory"].items():
    assert re.search(rf"{name.replace('_', ' ')} +{re.escape(format_bytes(size))}", text)
  assert written["collectives"]
  for kind, sent in written["collectives"].items():
    assert re.search(rf"{kind} +{sent['count']} +{re.escape(format_bytes(sent['links']))} ", text)
  for name in ("compute", "memory", "interconnect"):
    assert re.search(rf"{name} +{written['seconds'][name] * 1e3:.1f} ms", text)
  assert f"{written['input']['images_per_second_and_host']:,.0f} images/s" in text
  assert "8 pairs, batch 16 (compiled 4: 256.00 MiB, 8: 512.00 MiB, 16: more than available)" in text
