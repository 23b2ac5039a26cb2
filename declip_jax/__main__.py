"""Lists the commands and the configs: python -m declip_jax"""

from declip_jax import __version__, config_files

COMMANDS = {
  "train": ("declip_jax.train", "pretrain a model"),
  "evaluate": ("declip_jax.evaluate", "zero-shot classification and retrieval with trained weights"),
  "export": ("declip_jax.export", "write weights for open_clip, Hugging Face or Orbax"),
  "plan": ("declip_jax.plan", "memory, time and largest batch of a training, without its hardware"),
  "convert": ("declip_jax.data.convert", "write any source as ArrayRecord files"),
  "inspect": ("declip_jax.data.inspect", "describe a data set and draw samples"),
}


def main() -> None:
  """Prints the lists."""
  print(f"declip_jax {__version__}\n\ncommands, each with --help:")
  for name, (module, summary) in COMMANDS.items():
    print(f"  declip-{name:<10}python -m {module:<26}{summary}")
  print("\nconfigs, for --config=NAME:")
  for name in config_files.names():
    print(f"  {name}")


if __name__ == "__main__":
  main()
