"""Every property of tests/unit/test_properties.py on many more inputs, new ones each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time


def test_the_properties_hold_for_as_many_inputs_as_stated(repo, figures):
    started = time.monotonic()
    options = ["-q", "--timeout=7200", "--hypothesis-show-statistics", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(repo / "tests" / "unit" / "test_properties.py")],
        cwd=repo,
        env=os.environ | {"SQLBENCH_LONG": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    inputs = 0
    for name, part in re.findall(r"::test_(\w+):\n(.*?)(?=\n\n\S|\Z)", done.stdout, re.DOTALL):
        tried = sum(int(count) for count in re.findall(r"(\d+) passing", part))
        figures.record("properties", name.replace("_", " "), f"{tried:,} inputs")
        inputs += tried
    assert inputs > 100_000
    figures.record("properties", "all", f"{inputs:,} inputs, none failing, {(time.monotonic() - started) / 60:.0f} min")
