"Every command of the README is run, its Python is executed, its pictures are made again and compared."
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from house import MAKE, make, root

readme = (root/'README.md').read_text(encoding='utf-8')
commands = [line for block in re.findall(r'^```sh\n(.*?)^```', readme, re.M | re.S) for line in block.splitlines() if line.strip()]
bin_dir = Path(sys.executable).parent
PLANNED = ['make test', 'python3 -m venv .venv', ".venv/bin/pip install -e .", ".venv/bin/pip install -e '.[dev]'", '.venv/bin/python -m pytest -q tests']
SERVERS = ['make demo', '.venv/bin/vl-tutor demo']
MAKES = [c for c in commands if c.startswith('make ') and c not in PLANNED + SERVERS]
LINES = [c for c in commands if c.startswith('vl-tutor ')]


def test_every_command_has_its_test():
    assert set(commands) == {*PLANNED, *SERVERS, *MAKES, *LINES}
    assert len(MAKES) >= 3 and len(LINES) >= 4


def plan(target):
    "The commands that make would run on a fresh machine, one per line, in words"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('MAKE', 'MFLAGS'))}
    r = subprocess.run(['make', '-n', '--no-print-directory', 'VENV=.fresh', target], cwd=root, env=env, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in r.stdout.replace('.fresh/', '.venv/').replace('.fresh', '.venv').splitlines()
            if not line.startswith(('echo', 'rm', 'printf'))]


@pytest.mark.parametrize('command', PLANNED)
def test_planned_command_is_what_ci_runs(command):
    "These are what `.ci/run` itself does: its words stand, in this order, in the plan of `make test` or `make demo`"
    if command == 'make test':
        assert re.search(r'^make .*\btest\b', (root/'.ci'/'run').read_text(), re.M)
        return
    words = [w for w in shlex.split(command.replace('/pip ', '/python -m pip '))]
    target = 'install' if command.endswith('-e .') else 'test'
    held = lambda line: all(w in line for w in words) and [w for w in line if w in words] == words
    assert any(held(line) for line in plan(target)), f'{command} is not in the plan of make {target}'


def test_plan_holds_every_check():
    steps = [' '.join(line) for line in plan('test')]
    where = [next(i for i, s in enumerate(steps) if word in s) for word in ('venv .venv', 'pip', 'in_sync', 'sphinx -W', 'pytest -q tests')]
    assert where[:4] == sorted(where[:4])
    assert steps[-1].endswith('pytest -q tests')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def get(url):
    try: return urllib.request.urlopen(url, timeout=5).status
    except OSError: return None


@pytest.mark.parametrize('command', SERVERS)
def test_demo_starts(command):
    port = free_port()
    args = [*MAKE, 'demo', f'PORT={port}'] if command.startswith('make') else [bin_dir/'vl-tutor', 'demo', '--port', str(port)]
    server = subprocess.Popen(args, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while get(f'http://127.0.0.1:{port}/') != 200 and server.poll() is None and time.monotonic() < end: time.sleep(.5)
        assert get(f'http://127.0.0.1:{port}/') == 200, server.communicate(timeout=5)[0] if server.poll() is not None else 'no answer in two minutes'
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)


@pytest.mark.parametrize('command', MAKES)
def test_make_command(command, project, site):
    if command == 'make docs':
        assert (site/'index.html').exists()
        return
    make(*shlex.split(command)[1:], cwd=project)
    nb = re.search(r'NB=(\S+)', command)
    if nb: assert '"image/png"' in (project/nb[1]).read_text()
    else: assert not [p for p in (root/'vl_tutor').rglob('*.py') if p.read_bytes() != (project/p.relative_to(root)).read_bytes()]


@pytest.mark.parametrize('command', LINES)
def test_vl_tutor_command(command, tmp_path):
    shutil.copytree(root/'docs'/'images', tmp_path/'docs'/'images')
    r = subprocess.run([bin_dir/'vl-tutor', *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr
    if 'caption docs' in command: assert PICTURES['scene.png'][2] in r.stdout
    elif command.startswith('vl-tutor answer docs/'): assert r.stdout.startswith('docs/images/scene.png: yes') and 'blind' in r.stdout
    elif command.startswith('vl-tutor retrieve "'): assert r.stdout.splitlines()[0].endswith('docs/images/scene.png')
    elif command.startswith('vl-tutor explain docs/'): assert 'match' in r.stdout.splitlines()[1] and (tmp_path/'why.png').stat().st_size > 10_000
    elif command == 'vl-tutor data check docs/images': assert 'csv' in r.stdout and '2 records, 0 broken' in r.stdout
    elif command == 'vl-tutor data formats': assert {'coco', 'vqav2', 'refcoco+', 'msrvtt', 'shards'} <= {line.split()[0] for line in r.stdout.splitlines()}
    else: assert 'Usage' in r.stdout and len(r.stdout.split()) > 30


def test_python_lines(tmp_path):
    code, more, why = re.findall(r'^```python\n(.*?)^```', readme, re.M | re.S)
    assert len(code.splitlines()) <= 10
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr
    pairs = [line.split(' truth: ') for line in r.stdout.splitlines()]
    assert len(pairs) == 4
    assert sum(said.strip() == truth for said, truth in pairs) >= 3, r.stdout
    shutil.copytree(root/'docs'/'images', tmp_path/'docs'/'images')
    r = subprocess.run([sys.executable, '-c', more], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr
    assert r.stdout.startswith("[('ring', ") and r.stdout.splitlines()[-1] == PICTURES['scene.png'][2], r.stdout
    r = subprocess.run([sys.executable, '-c', why], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() in {f'({row}, {col}) torch.Size([11, 6, 6])' for row in (0, 1, 2) for col in (0, 1, 2)}, r.stdout


PICTURES = {'scene.png': ('shapes', 0, 'a large blue ring left of a large orange circle'), 'digits.png': ('digits', 1, 'a large purple three left of a small red one')}


def scene(skin, index):
    "A scene of the test split at four times its size, `(s s 3)`"
    from vl_tutor.world.scenes import World
    batch = World('pair', 'test', skin=skin).batch([index])
    return batch['image'][0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1), batch['caption'][0]


@pytest.mark.parametrize('name', PICTURES)
def test_pictures_are_made_by_the_world(name):
    skin, index, caption = PICTURES[name]
    pixels, truth = scene(skin, index)
    assert truth == caption
    assert np.array_equal(np.asarray(Image.open(root/'docs'/'images'/name)), pixels)


def test_links_and_pictures_exist():
    targets = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', readme)
    local = [a or b for a, b in targets if not (a or b).startswith('http')]
    assert len(local) > 15
    assert not [t for t in local if not (root/t).exists()]


def test_chapter_map_is_complete():
    mapped = re.findall(r'^\| \[[^]]+\]\((nbs/[^)]+\.ipynb)\)', readme, re.M)
    there = sorted(p.relative_to(root).as_posix() for p in (root/'nbs').rglob('*/[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    assert sorted(mapped) == there
    first = {Path(p).parent: min(Path(q).name for q in there if Path(q).parent == Path(p).parent) for p in there}
    assert mapped == sorted(mapped, key=lambda p: (first[Path(p).parent], Path(p).name)), 'not in reading order'
