"""What surrounds the package: metadata that several files repeat, CI, and the versions of tools."""

from collections.abc import Iterator
from pathlib import Path
import re
from typing import Any

import pytest
import yaml

import declip_jax

ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "setup.py").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
  for job in workflow["jobs"].values():
    yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_of_make_that_exist_on_supported_versions(path: Path) -> None:
  workflow = yaml.safe_load(path.read_text())
  commands = [step["run"] for step in steps(workflow) if "run" in step]
  assert commands
  targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  for command in commands:
    assert set(re.fullmatch(r"make((?: [\w-]+)+)", command)[1].split()) <= targets, command
  for job in workflow["jobs"].values():
    assert job["runs-on"]
    assert job["steps"][0]["uses"].startswith("actions/checkout@")
  supported = set(re.findall(r"Python :: (3\.\d+)", SETUP))
  matrices = [job.get("strategy", {}).get("matrix", {}).get("python", []) for job in workflow["jobs"].values()]
  fixed = {step["with"]["python-version"] for step in steps(workflow) if "python-version" in step.get("with", {})}
  assert {version for matrix in matrices for version in matrix} == supported
  assert {version for version in fixed if "matrix" not in version} <= supported


def test_ci_tests_what_make_check_does_and_what_needs_other_packages_and_builds_the_documentation() -> None:
  commands = [step["run"] for path in WORKFLOWS for step in steps(yaml.safe_load(path.read_text())) if "run" in step]
  assert {"make lint", "make test", "make wheel", "make test-wheel", "make test-trackers"} <= {*commands}
  for first, second in (("make docs-notebooks", "make docs"), ("make chromium", "make test-browser")):
    assert commands.index(second) == commands.index(first) + 1


def test_the_hooks_of_a_commit_have_the_tested_version_of_ruff() -> None:
  (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
  assert repository["repo"].endswith("/ruff-pre-commit")
  assert repository["rev"] == f"v{PINNED['ruff']}"
  assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}


def test_the_address_of_the_repository_and_the_version_are_the_same_everywhere() -> None:
  address = declip_jax.ADDRESS
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert (citation["repository-code"], citation["version"]) == (address, declip_jax.__version__)
  assert f"\n## {declip_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_metadata_have_the_readme_with_links_that_work_elsewhere_and_all_licences(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  given: dict[str, Any] = {}
  monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
  monkeypatch.chdir(ROOT)
  exec(compile(SETUP, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
  links = re.findall(r"\]\(([^)]+)\)", given["long_description"])
  assert len(links) > 20
  assert all(link.startswith(("https://", "#")) for link in links)
  for link in [*links, *given["project_urls"].values()]:
    if path := re.fullmatch(rf"{re.escape(declip_jax.ADDRESS)}/blob/main/([^#]+)(#.*)?", link):
      assert (ROOT / path[1]).exists(), link
  found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "declip_jax").rglob("*LICENSE*")}
  assert set(given["license_files"]) == {"LICENSE", *found}
