"Helpers of the house tests: where the project is, and make with the environment that runs the tests."
import os
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
# DEV and USE are the Makefile's install stamps: emptied, since the environment that runs this test is the one to use.
MAKE = ['make', '--no-print-directory', f'VENV={sys.prefix}', 'DEV=', 'USE=']


def make(*args, cwd, **kwargs):
    "Run make in a folder with this environment, and return what it printed"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))} | {'PYTHONPATH': str(cwd)}
    r = subprocess.run([*MAKE, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **kwargs)
    assert r.returncode == 0, f'make {" ".join(args)}: exit {r.returncode}\n{r.stdout[-2000:]}\n{r.stderr[-4000:]}'
    return r.stdout
