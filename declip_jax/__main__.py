"""Lists the commands, configs, methods and architectures: python -m declip_jax"""

import sys
from typing import NoReturn

from declip_jax import __version__, command_line, config_files
from declip_jax.spelling import close_names, suggest

COMMANDS = {
  "train": ("declip_jax.train", "pretrain a model"),
  "evaluate": ("declip_jax.evaluate", "what papers measure of trained weights: zero-shot, probes, retrieval"),
  "report": ("declip_jax.report", "tables and pictures of evaluations, side by side"),
  "export": ("declip_jax.export", "write weights for open_clip, Hugging Face or Orbax"),
  "new": ("declip_jax.new", "write a config file of your own, with comments"),
  "plan": ("declip_jax.plan", "memory, time and largest batch of a training run, without its hardware"),
  "overlap": ("declip_jax.overlap", "find evaluation images in training data"),
  "search": ("declip_jax.search", "search images by text or image, on a page"),
  "embed": ("declip_jax.embed", "write embeddings of images for faiss and other tools"),
  "convert": ("declip_jax.data.convert", "write any source as ArrayRecord files"),
  "inspect": ("declip_jax.data.inspect", "describe a data set and draw samples"),
}


def describe(name: str) -> str:
  """Returns a line about a config: its title and, if it is a published result, its top-1 accuracy on ImageNet."""
  module = config_files.load_module(name)
  title = (module.__doc__ or "").splitlines()[0].rstrip(".")
  accuracies = getattr(module, "PUBLISHED", {}).get("imagenet_top1_percent", {})
  published = ", ".join(f"{protocol.replace('_', '-')} {value}" for protocol, value in accuracies.items())
  return f"  {name:<32}{title}" + (f" ({published})" if published else "")


def suggest_command(name: str) -> NoReturn:
  """Says in a line what to type instead of a name that is not the module of a command, and exits with 2."""
  commands = [f"python -m {COMMANDS[close][0]}" for close in close_names(name, COMMANDS)]
  hint = suggest(commands) or "; python -m declip_jax lists all"
  print(f"error: {name!r} is not the name of a command's module{hint}", file=sys.stderr)
  sys.exit(2)


def main() -> None:
  """Prints the lists; exits with 2 after an argument."""
  if sys.argv[1:] not in ([], ["--help"]):
    suggest_command(sys.argv[1])
  print(f"declip_jax {__version__}\n\ncommands, each with --help:")
  for name, (module, summary) in COMMANDS.items():
    print(f"  declip-{name:<10}python -m {module:<26}{summary}")
  print("\nconfigs, for --config=NAME, with their published top-1 accuracies on ImageNet in per cent:")
  for name in config_files.names():
    print(describe(name))
  print("", *command_line.named_lines(), sep="\n")


if __name__ == "__main__":
  with command_line.closed_pipe_exits():
    main()
