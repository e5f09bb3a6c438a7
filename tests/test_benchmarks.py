"The benchmark command runs, checks its outputs, and ends with one JSON object; times are its business, not this test's."
import json
import subprocess
import sys
from pathlib import Path

script = Path(__file__).resolve().parents[1]/'benchmarks'/'run.py'


def run(*args): return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=600)

def test_last_line_is_json():
    r = run('P1', 'P5', 'P7', 'P8', 'P9', 'P10', 'P12', 'P13', 'P14', '--pairs', '1', '--threads', '1')
    assert r.returncode == 0, r.stderr[-3000:]
    out = json.loads(r.stdout.splitlines()[-1])
    assert [row['name'] for row in out['rows']] == ['P1', 'P1', 'P5', 'P5', 'P5', 'P7', 'P8', 'P8', 'P9', 'P9', 'P10', 'P12', 'P13', 'P14'] and out['pairs'] == 1
    assert all(row['ratio'] > 0 and row['target'] > 0 for row in out['rows'])

def test_bytes_are_no_matter_of_luck():
    "Bytes kept for the backward pass are counted, not timed: the fused attention must keep fewer, the more so the longer"
    rows = json.loads(run('P5', '--threads', '1').stdout.splitlines()[-1])['rows']
    ratios = [row['ratio'] for row in rows]
    assert ratios == sorted(ratios) and ratios[0] > 1.4 and ratios[-1] > 4

def test_unknown_rows_are_named():
    r = run('P99')
    assert r.returncode == 2 and 'no row P99' in r.stderr
