"""Names the module of the command: python -m declip_jax.data.inspect"""

from declip_jax.__main__ import suggest_command

if __name__ == "__main__":
  suggest_command("inspect")
