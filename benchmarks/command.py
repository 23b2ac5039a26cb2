"""The command line of every benchmark."""

import argparse


def parser(doc: str | None) -> argparse.ArgumentParser:
  """A parser whose `--help` prints the docstring of the benchmark as it is."""
  return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
