"""Takes train steps on request, for `steps.py --beside`, which runs one such process per source tree.

  python benchmarks/step_worker.py --config demo --method clip

Compiles the step and prints one line of JSON with `batch_size` and `compile_seconds`. Then it takes one step for each
line that it reads from stdin, and prints one line of JSON with `seconds` and `cpu_seconds`. It exits at the end of
stdin. A worker for another version of the package has to follow the same protocol.
"""

import json
import sys
import time

from command import parser
from train_step import make_train_step, read_config


def main() -> None:
  """Runs the worker."""
  arguments = parser(__doc__)
  arguments.add_argument("--config", default="demo", help="name of a config with an argument `method` (default: demo)")
  arguments.add_argument("--method", default="clip", help="method (default: clip)")
  arguments.add_argument("--batch-size", type=int, help="pairs per step (default: as in the config)")
  args = arguments.parse_args()
  config = read_config(args.config, args.method)
  config.batch_size = args.batch_size or config.batch_size
  step = make_train_step(config)
  print(json.dumps({"batch_size": config.batch_size, "compile_seconds": step.compile_seconds}), flush=True)
  for _ in sys.stdin:
    start, cpu_start = time.perf_counter(), time.process_time()
    step()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
  main()
