"""Two processes that each have their share of the rows find what one process finds."""

import os
import subprocess
import sys

import numpy as np
import probe_hosts
import pytest
import runs


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
  command = [sys.executable, probe_hosts.__file__, str(tmp_path / "found.npz"), str(20000 + os.getpid() % 20000)]
  processes = [subprocess.Popen([*command, str(index)], env=runs.environment()) for index in range(2)]
  assert [process.wait(timeout=200) for process in processes] == [0, 0]
  expected = probe_hosts.results()
  with np.load(tmp_path / "found.npz") as found:
    assert sorted(found.files) == sorted(expected)
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-3 if name == "swept" else 1e-4, err_msg=name)
    np.testing.assert_array_equal(found["swept"].argmax(axis=1), expected["swept"].argmax(axis=1))
