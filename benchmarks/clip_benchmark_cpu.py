"""CLIP_benchmark's command on a CPU: python -O benchmarks/clip_benchmark_cpu.py SECONDS eval --dataset ...

Its linear probe asserts that its device is CUDA, and moves modules and tensors there. Here -O leaves assertions out,
and `cuda()` returns what it is called on; all else is as released. The file SECONDS gets one JSON object per
evaluation.
"""

import json
from pathlib import Path
import sys
import time
from typing import Any

from command import parser
from optional_imports import optional_import

torch, open_clip, cli = (optional_import(name) for name in ("torch", "open_clip", "clip_benchmark.cli"))


def main() -> None:
  """Runs the command."""
  arguments = parser(__doc__)
  arguments.add_argument("seconds", type=Path, help="file to add a line to for each evaluation")
  args, sys.argv[1:] = arguments.parse_known_args()
  if cli is None:
    arguments.error("CLIP_benchmark is not installed; make bench-clip-benchmark installs it")
  log, run = args.seconds, cli.run
  torch.nn.Module.cuda = torch.Tensor.cuda = lambda self: self

  def timed(args: Any) -> None:
    start = time.perf_counter()
    run(args)
    line = {"dataset": args.dataset, "task": args.task, "seconds": time.perf_counter() - start}
    with log.open("a") as file:
      file.write(json.dumps(line) + "\n")

  cli.run = timed
  cli.main()


if __name__ == "__main__":
  main()
