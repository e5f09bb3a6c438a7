"One test per notebook: each runs from a clean state in a process of its own, inside its time budget."
import os
import subprocess
import sys
import time
import pytest
from house import root

notebooks = sorted((p for p in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(root/'nbs').parts)),
                   key=lambda p: (p.name, p))
run = 'import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1])'
BUDGET = 120        # seconds on two idle cores (house style 1)
PATIENCE = 2        # times as long is still accepted: shared machines are not idle


@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.relative_to(root/'nbs').as_posix())
def test_notebook(notebook):
    start = time.monotonic()
    r = subprocess.run([sys.executable, '-c', run, str(notebook)], cwd=root, text=True, capture_output=True, timeout=BUDGET*PATIENCE*1.5,
                       env={**os.environ, 'OMP_NUM_THREADS': '2'})
    assert r.returncode == 0, f'{notebook.name} exited {r.returncode}\n{r.stdout[-2000:]}\n{r.stderr[-6000:]}'
    assert 'Success.' in r.stdout
    assert time.monotonic() - start < BUDGET*PATIENCE, f'{notebook.name} is over its time budget of {BUDGET} s'


def test_there_are_notebooks():
    assert len(notebooks) > 1
