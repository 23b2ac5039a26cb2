"""Names the module of the command: python -m declip_jax.data.convert"""

from declip_jax.__main__ import suggest_command

if __name__ == "__main__":
  suggest_command("convert")
