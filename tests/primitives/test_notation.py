"The helpers that draw and judge, and the shape of the three chapters that introduce them."
import ast
import json
import re
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives import notation
from vl_tutor.primitives.notation import ALPHABET, PALETTE, check, draw_flow, expect_fail, show_heat, show_images, time_ratio, to_grid

few = settings(max_examples=30, deadline=None)
chapters = [Path(__file__).resolve().parents[2]/'nbs'/'primitives'/f'{name}.ipynb' for name in ('00_notation', '01_attention', '02_transformer')]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def texts(ax): return [t.get_text() for t in ax.texts]


# ---- letters and colours ----

def test_one_alphabet():
    assert list(ALPHABET)[:10] == list('bnpmhdtvek')
    assert all(len(letter) == 1 for letter in ALPHABET) and len(set(ALPHABET.values())) == len(ALPHABET)


def test_palette():
    assert set(PALETTE) == {'image', 'text', 'latent', 'key', 'grey', 'light'}
    assert len({c.upper() for c in PALETTE.values()}) == 6 and all(re.fullmatch('#[0-9A-F]{6}', c) for c in PALETTE.values())


# ---- drawing ----

@pytest.mark.parametrize('x, shape', [
    (torch.zeros(3, 4, 5), (4, 5, 3)), (torch.zeros(1, 4, 5), (4, 5)), (torch.zeros(4, 5), (4, 5)), (torch.zeros(4, 1), (4, 1)), (torch.zeros(1, 1), (1, 1)),
    (np.zeros((2, 3)), (2, 3)), ([[1, 2], [3, 4]], (2, 2)), (torch.zeros(4, 5, 3), (4, 5, 3)), (torch.zeros(2, 2, requires_grad=True), (2, 2))])
def test_to_grid(x, shape): assert to_grid(x).shape == shape


def test_to_grid_scales_bytes_only():
    assert to_grid(torch.full((3, 2, 2), 255, dtype=torch.uint8)).max() == 1
    assert to_grid(torch.full((2, 2), 5.)).max() == 5 and to_grid(torch.ones(2, 2, dtype=torch.bool)).max() == 1


def test_heat_map():
    ax = show_heat(torch.tensor([[0., .5], [1., .25]]), rows=['a', 'b'], cols=['c', 'd'], title='who', numbers=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b'] and [t.get_text() for t in ax.get_xticklabels()] == ['c', 'd']
    assert texts(ax) == ['0.00', '0.50', '1.00', '0.25'] and ax.get_title() == 'who'
    assert ax.texts[0].get_color() == 'w' and ax.texts[2].get_color() == 'k'                   # readable on dark and on bright
    fig, mine = plt.subplots()
    assert show_heat(torch.zeros(2, 2), mine) is mine and texts(mine) == []
    with expect_fail('(r c)'): show_heat(torch.zeros(2))


@few
@given(st.integers(1, 9), st.integers(1, 5))
def test_images_in_rows(n, ncols):
    fig = show_images(torch.rand(n, 3, 4, 4), titles=list(map(str, range(n))), ncols=ncols)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list(map(str, range(n)))
    assert len(fig.axes) == -(-n//ncols)*min(n, ncols)
    plt.close(fig)


def test_diagram():
    boxes = dict(a=(0, 0, 'A', 'image'), b=(2, 0, 'B', 'text'), c=(2, 2, 'C', 'grey'))
    fig = draw_flow(boxes, [('a', 'b'), ('b', 'c')], lit=['a', 'b'])
    ax = fig.axes[0]
    labels = [t for t in ax.texts if t.get_text()]
    assert [t.get_text() for t in labels] == ['A', 'B', 'C']
    assert [plt.matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in ax.patches] == [PALETTE['image'], PALETTE['text'], PALETTE['light']]
    for box in ax.patches:                                                                     # nothing is cut off
        assert ax.get_xlim()[0] <= box.get_x() and box.get_x() + box.get_width() <= ax.get_xlim()[1]
        assert ax.get_ylim()[0] <= box.get_y() and box.get_y() + box.get_height() <= ax.get_ylim()[1]
    with expect_fail("no box named ['d']"): draw_flow(boxes, [('a', 'd')])
    with expect_fail("no box named ['e']"): draw_flow(boxes, [], lit=['e'])


# ---- judging ----

@few
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.data())
def test_check_names_the_first_wrong_place(numbers, data):
    wrong = data.draw(st.integers(0, len(numbers) - 1))
    right = torch.tensor(numbers, dtype=torch.float64)
    off = right.clone()
    off[wrong:] += 1
    assert check(lambda x: x, lambda x: x, right) == 'correct: largest difference 0'
    with pytest.raises(AssertionError, match=re.escape(f'at ({wrong},): {off[wrong].item():.6g}, expected {right[wrong].item():.6g}')):
        check(lambda x: off, lambda x: x, right)


@pytest.mark.parametrize('mine, words', [
    (lambda x: None, 'forget `return`'), (lambda x: x[:1], r'shape \(1,\), expected \(2,\)'), (lambda x: x*torch.nan, r'at \(0,\): nan, expected 1'),
    (lambda x: x/0, r'at \(0,\): inf, expected 1'), (lambda x: x + 2e-6, r'at \(0,\)')])
def test_check_refuses(mine, words):
    with pytest.raises(AssertionError, match=words): check(mine, lambda x: x, torch.tensor([1., 2.]))


def test_check_accepts():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.])
    assert 'correct' in check(lambda x: x.clone(), lambda x: x, special)
    assert 'correct' in check(lambda: 3, lambda: 3) and 'correct' in check(lambda: [], lambda: [])
    assert 'correct' in check(lambda x: x + .05, lambda x: x, torch.zeros(3), atol=.1)
    assert 'correct' in check(lambda x: x > 0, lambda x: x > 0, torch.zeros(3, requires_grad=True))


def test_expect_fail():
    with expect_fail(): raise ValueError('anything')
    with expect_fail('b m'): raise ValueError('a mask is (b m)')
    with pytest.raises(AssertionError, match='no ValueError'):
        with expect_fail(): pass
    with pytest.raises(AssertionError, match="'x' not in 'y'"):
        with expect_fail('x'): raise ValueError('y')
    with pytest.raises(KeyError):
        with expect_fail(): raise KeyError('another kind')


def test_time_ratio(monkeypatch):
    clock = [0.]
    monkeypatch.setattr(notation.time, 'perf_counter', lambda: clock[0])
    def wait(seconds): clock[0] += seconds
    assert time_ratio(lambda: wait(6.), lambda: wait(2.), n=5) == pytest.approx(3)
    calls = iter([1., 1., 100., 1., 1.])                                                       # one busy moment does not count
    assert time_ratio(lambda: wait(next(calls, 1.)), lambda: wait(1.), n=5) == pytest.approx(1)


# ---- the chapters ----

def cells(path, kind): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]
def blocks(text): return re.findall(r'```python\n(.*?)```', text, re.S)


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_skeleton(path):
    found = [m[1] for text in cells(path, 'markdown') if (m := re.match(r'## (.+)', text))]
    wanted = ['You will build', 'You need', 'In the paper', 'Put together', 'Does it learn?', 'What the released code does differently', 'Exercises', 'Recap', 'Where next']
    assert [f for f in found if f in wanted] == wanted
    recap = next(text for text in cells(path, 'markdown') if text.startswith('## Recap'))
    assert len(re.findall(r'^\d\. ', recap, re.M)) == 5


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_cells_are_short(path):
    for text in cells(path, 'markdown'):
        prose = re.sub(r'```.*?```|</?\w+>|\$\$.*?\$\$', ' ', text, flags=re.S)
        assert len(prose.split()) <= 75, text
    lengths = [len([line for line in code.splitlines() if line.strip() and not line.startswith('#|')]) for code in cells(path, 'code')]
    assert max(lengths) <= 35 and sorted(lengths)[len(lengths)//2] <= 6


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_answers_shown_are_answers_run(path):
    hidden = [ast.unparse(ast.parse(code)) for code in cells(path, 'code') if code.startswith('#| hide')]
    answers = [block for text in cells(path, 'markdown') if '<summary>Answer</summary>' in text for block in blocks(text)]
    stubs = [code for code in cells(path, 'code') if code.startswith('#| eval: false')]
    assert len(answers) == len(stubs) >= 3
    for answer, stub in zip(answers, stubs):
        shown = ast.unparse(ast.parse(answer))
        run = [code for code in hidden if shown in code]
        assert run, f'shown but not run:\n{answer}'
        judge = ast.unparse(ast.parse(stub.split('\n', 1)[1])).splitlines()[-1]
        assert judge.startswith('check(')
        assert any('check(' in code for code in run)
        name = re.match(r'def (\w+)', shown)[1]
        assert f'def {name}(' in stub and name in judge


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_every_figure_has_a_reading_and_a_description(path):
    seen = 0
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if any('image/png' in out.get('data', {}) for out in cell.get('outputs', [])):
            source, seen = ''.join(cell['source']), seen + 1
            assert '#| fig-cap:' in source and '#| fig-alt:' in source, source
    assert seen >= 5


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_every_export_is_used_in_its_chapter(path):
    code = cells(path, 'code')
    exported = [n.name for c in code if re.match(r'#\| exports?\n', c) for n in ast.parse(c).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    rest = '\n'.join(c for c in code if not re.match(r'#\| exports?\n', c))
    assert not [name for name in exported if name not in rest]
    assert len(re.findall(r'^\s*(?:assert|test_\w+\(|with expect_fail|check\()', rest, re.M)) >= len(exported)
