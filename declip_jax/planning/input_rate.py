"""How many images per second the hosts have to deliver, and how many cores that takes at measured rates."""

import dataclasses

# Images per second and core, by `config.data.recipe`: with the engines "fast" and "exact", and the host's share of the
# work with `config.data.augment_on="device"`. docs/results.md, "The input pipeline", 500x375 JPEGs of 58 kB.
RATES = {
  "clip": (840, 501, 876),
  "openai": (727, 417, 747),
  "slip": (411, 111, 609),
  "slip_mocov3": (404, 105, 607),
  "declip": (431, 120, 667),
  "filip": (620, 213, 883),
}
# Recipes with the image views of a measured recipe, or with fewer.
SIMILAR = {
  "declip_repo": "declip",
  "filip_repo": "filip",
  "clip_color": "filip",
  "clip_crop": "filip",
  "clip_full": "filip",
  "simclr": "declip",
  "slip_mim": "declip",
}


@dataclasses.dataclass(frozen=True)
class InputRate:
  """Input that the fastest possible step requires.

  Attributes:
    step: seconds of that step.
    utilisation: model FLOPs utilisation of that step, 0 to 1.
    images_per_second: images of the data set, over all hosts.
    images_per_second_and_host: images of the data set on each host.
    cores_per_host: cores that read, decode and augment them; None if the recipe's rate was not measured.
    cpus_per_host: virtual CPUs of each host; None if unknown.
    measured_recipe: the recipe whose rate is used.
    measured_rate: images per second and core of that recipe; None if it was not measured.
  """

  step: float
  utilisation: float
  images_per_second: float
  images_per_second_and_host: float
  cores_per_host: float | None
  cpus_per_host: float | None
  measured_recipe: str
  measured_rate: int | None


def measured_rate(recipe: str, engine: str, augment_on: str) -> tuple[str, int | None]:
  """The measured recipe with the views of `recipe`, and its images per second and core; None if there is none."""
  name = SIMILAR.get(recipe, recipe)
  column = 2 if augment_on == "device" else ("fast", "exact").index(engine)
  return name, RATES[name][column] if name in RATES else None
