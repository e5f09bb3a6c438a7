"Why, from a terminal: `vl-tutor explain` says what `explain` finds, and refuses what no method can grant"
import json
import re
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from vl_tutor.explain.one_call import METHODS, TABLE, explain
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc

vl_tutor = str(Path(sys.executable).parent/'vl-tutor')
TEXT, QUESTION = 'a red ring left of a blue star', 'is there a ring ?'


@pytest.fixture(scope='module')
def open_weights(tmp_path_factory):
    "A captioner that never learned anything, its doors open, so that words look somewhere"
    from vl_tutor.models.captioner import SIZES, Captioner
    from vl_tutor.training.checkpoints import save_model
    from vl_tutor.world.language import world_tokenizer
    torch.manual_seed(0)
    model, folder = Captioner(SIZES['tiny']).eval(), tmp_path_factory.mktemp('open')/'captioner'
    with torch.no_grad():
        for block in model.gated.values(): block.gate_attn.fill_(.5)
    save_model(model, folder, {})
    world_tokenizer().save(folder)
    return folder


@pytest.fixture(scope='module')
def scene(pictures): return pictures['scene.png']


@pytest.fixture
def tools(open_weights, vlc_weights): return dict(caption=(load_captioner(open_weights), open_weights), answer=(load_vlc(vlc_weights), vlc_weights))


def rows_of(r):
    assert r.code == 0, r.err
    return json.loads(r.out)


def refused(r, *words):
    assert r.code == 2, (r.code, r.out, r.err)
    assert not r.out and r.err.startswith('vl-tutor: ') and len(r.err.strip().splitlines()) == 1 and 'Traceback' not in r.err, r.err
    for word in words: assert str(word) in r.err, f'{word} is not named: {r.err}'


def same_maps(rows, want):
    "Maps of the command sum to 1 and have the shape of ours; the patch it names is their largest"
    for row, m in zip(rows, want, strict=True):
        share = m/m.sum().clamp(min=1e-30)
        assert torch.allclose(torch.tensor(row['map']), share, atol=1e-4), row['word']
        if not m.sum(): assert (row['row'], row['column'], row['share']) == (None, None, 0)
        else: assert share[row['row'], row['column']].item() == pytest.approx(row['share'], abs=1e-3) and row['share'] == pytest.approx(share.max().item(), abs=1e-3)


# ---- it is what explain() finds ----

@pytest.mark.parametrize('system, text, target', [('caption', TEXT, None), ('answer', QUESTION, None), ('answer', TEXT, 'words'), ('answer', TEXT, 'match'),
                                                  ('answer', TEXT, 'rank'), ('answer', QUESTION, 'no')])
@pytest.mark.parametrize('method', METHODS)
def test_every_system_target_and_method(run, scene, tools, system, text, target, method):
    tool, folder = tools[system]
    asked = [*(['--target', target] if target else []), '--method', method]
    rows = rows_of(run('explain', scene, text, '--system', system, '--weights', folder, *asked, '--json'))
    ex = explain(tool, scene, text, target or dict(caption='words', answer='answer')[system])
    assert [row['word'] for row in rows] == ex.labels and {row['method'] for row in rows} == {method}
    assert [row['score'] for row in rows] == pytest.approx([ex.scores[k].item() for k in ex.case.scores], abs=1e-3)
    same_maps(rows, ex.maps(method))


@pytest.mark.parametrize('method', [m for m in METHODS if m not in TABLE])
def test_a_layer_and_a_head(run, scene, tools, method):
    tool, folder = tools['answer']
    head = [] if method == 'gradcam' else ['--head', 1]
    rows = rows_of(run('explain', scene, TEXT, '--system', 'answer', '--target', 'match', '--weights', folder, '--method', method, '--layer', 1, *head, '--json'))
    same_maps(rows, explain(tool, scene, TEXT, 'match').maps(method, layer=1, **({'head': 1} if head else {})))
    assert rows[0]['layer'] == 1 and rows[0].get('head') == (1 if head else None)


@pytest.mark.parametrize('system, text, target', [('caption', TEXT, 'words'), ('answer', TEXT, 'words'), ('answer', QUESTION, 'answer')])
def test_without_a_method_the_one_that_points_best(run, scene, tools, system, text, target):
    tool, folder = tools[system]
    rows = rows_of(run('explain', scene, text, '--system', system, '--target', target, '--weights', folder, '--json'))
    how = tool.pointing() if system == 'caption' else tool.pointing(target)
    assert all(row[k] == v for row in rows for k, v in how.items()), how
    same_maps(rows, explain(tool, scene, text, target).maps(**how))


def test_without_a_text_the_captioner_explains_its_own(run, scene, tools):
    tool, folder = tools['caption']
    rows = rows_of(run('explain', scene, '--weights', folder, '--json'))
    assert [row['word'] for row in rows] == tool.caption([scene])[0].words


def test_words_by_name_and_by_number(run, scene, open_weights):
    ask = lambda *words: [(r['place'], r['word']) for r in rows_of(run('explain', scene, TEXT, '--weights', open_weights, '--json', *(x for w in words for x in ('--word', w))))]
    assert ask('a') == [(0, 'a'), (5, 'a')] and ask('7', 'red', 'red') == [(1, 'red'), (7, 'star')] and len(ask()) == 8


def test_a_match_is_a_word_of_its_own(run, scene, vlc_weights):
    for name in ('match', '(match)'):
        (row,) = rows_of(run('explain', scene, TEXT, '--system', 'answer', '--target', 'match', '--word', name, '--weights', vlc_weights, '--json'))
        assert row['word'] == '(match)' and row['place'] == 0


# ---- for a person ----

def test_a_line_for_each_word(run, scene, tools):
    tool, folder = tools['caption']
    r = run('explain', scene, TEXT, '--weights', folder, '--method', 'relevance')
    head, how, names, *lines = r.out.splitlines()
    assert (head, how, names.split()) == (f'{scene}: {TEXT}', 'relevance', ['probability', 'row', 'column', 'share', 'word']) and not r.err
    ex = explain(tool, scene, TEXT)
    assert [line.split()[-1] for line in lines] == ex.labels
    assert [float(line.split()[0]) for line in lines] == pytest.approx(ex.scores.exp().tolist(), abs=1e-3)
    assert [tuple(map(int, line.split()[1:3])) for line in lines] == [divmod(int(m.argmax()), 6) for m in ex.maps('relevance')]


def test_an_answer_has_one_score(run, scene, tools):
    tool, folder = tools['answer']
    r = run('explain', scene, QUESTION, '--system', 'answer', '--weights', folder)
    ex = explain(tool, scene, QUESTION, 'answer')
    lines, how = r.out.splitlines(), tool.pointing('answer')
    assert lines[1] == f'{how["method"]}, layer {how["layer"]}, {ex.labels[0][1:-1]} {ex.scores[0].item():.3f}' and lines[0] == f'{scene}: {QUESTION}'
    assert len(lines) == 3 + len(ex.labels) and all(re.fullmatch(r' *\d+ +\d+ +0\.\d\d  \S+', line) for line in lines[3:]), lines


# ---- the figure ----

def test_the_figure_is_the_one_of_the_chapter(run, scene, tools, tmp_path):
    from vl_tutor.explain.figures import show_explanation
    tool, folder = tools['caption']
    r = run('explain', scene, TEXT, '--weights', folder, '--word', 'red', '--word', 'star', '--method', 'rollout', '--out', tmp_path/'why.png')
    assert r.code == 0 and 'why.png' in r.err and 'why.png' not in r.out
    show_explanation(explain(tool, scene, TEXT), 'rollout', words=[1, 7]).savefig(tmp_path/'want.png', dpi=130)
    assert (np.array(Image.open(tmp_path/'why.png')) == np.array(Image.open(tmp_path/'want.png'))).all()
    run('explain', scene, TEXT, '--weights', folder, '--word', 'red', '--word', 'star', '--method', 'gradient', '--out', tmp_path/'why.png')
    other = Image.open(tmp_path/'why.png')
    assert other.size == Image.open(tmp_path/'want.png').size and (np.array(other) != np.array(Image.open(tmp_path/'want.png'))).any()


def test_help_names_every_method(run):
    said = run('explain', '--help').out
    assert all(re.search(rf'^\W*{name}\s{{2,}}\S', said, re.M) for name in METHODS) and '--system' in said and 'why.png' in said


def test_nothing_to_point_at(run, scene, weights):
    "Doors still shut: no gradient reaches a patch, and no patch is named"
    rows = rows_of(run('explain', scene, TEXT, '--weights', weights, '--method', 'relevance', '--json'))
    assert all(row['row'] is None and row['share'] == 0 and not np.any(row['map']) for row in rows)
    line = run('explain', scene, TEXT, '--weights', weights, '--method', 'relevance', '--word', 'red').out.splitlines()[-1]
    assert line.split()[1:] == ['-', '-', '0.00', 'red']


# ---- mistakes ----

@pytest.mark.parametrize('args, words', [
    (['{p}', ' '], ['text is empty']), (['gone.png'], ['gone.png', 'does not exist']), (['{n}'], ['notes.png', 'not a JPEG']), (['{p}', '--method', 'sight'], ['sight', 'attention', 'relevance']),
    (['{p}', '--system', 'speech'], ['--system speech', 'caption', 'answer']), (['{p}', '--system', 'answer'], ['--system answer', 'question']), (['{p}', TEXT, '--target', 'match'], ['words', 'match']),
    (['{p}', TEXT, '--word', 'green'], ['--word green', 'red', 'ring', '0 to 7']), (['{p}', TEXT, '--word', '8'], ['--word 8']), (['{p}', TEXT, '--word', '-1'], ['--word -1']),
    (['{p}', TEXT, '--layer', '5'], ['layers 0 to 1', '5']), (['{p}', TEXT, '--head', '9'], ['--head 9', 'heads 0 to 2']), (['{p}', TEXT, '--method', 'rollout', '--layer', '0'], ['--layer 0', 'rollout', 'all layers']),
    (['{p}', TEXT, '--method', 'gradcam', '--head', '0'], ['--head 0', 'gradcam']), (['{p}', '--out', 'why.jpg'], ['--out', 'why.jpg', '.png']), (['{p}', '--out', 'no/such/why.png'], ['--out', 'no/such', 'does not exist']),
    (['{p}', '--out', '{p}'], ['--out', 'written over']), (['{p}', '--out', 'a'*300 + '.png'], ['--out', 'cannot be written']), (['{p}', '<bos>'], ['no word in the caption']), (['{p}', 'red '*99], ['caption of 99 words']),
    (['{p}', '--weights', 'no/such'], ['--weights', 'no/such', 'does not exist']), (['{p}', QUESTION, '--system', 'answer', '--weights', 'no/such'], ['--weights', 'no/such', 'does not exist']),
    (['{p}', '--layer', 'two'], ['--layer', 'integer']), ([], ['PICTURE'])], ids=lambda v: ' '.join(v)[:40] if isinstance(v, list) and len(v) > 1 else '')
def test_one_sentence(run, scene, open_weights, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'notes.png').write_text('no picture')
    mine = [] if '--weights' in args or 'answer' in args or not args else ['--weights', open_weights]
    refused(run('explain', *[a.format(p=scene, n=tmp_path/'notes.png') for a in args], *mine), *words)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.png']


@pytest.mark.parametrize('args, words', [([QUESTION, '--target', 'purple haze'], ['purple haze', 'words', 'match', 'rank', 'answer']), (['very '*90 + 'red ?'], ['tokens', 'at most']),
                                         ([QUESTION, '--layer', '6'], ['layers 0 to 1', '6'])], ids=range(3))
def test_one_sentence_of_the_answering_model(run, scene, vlc_weights, args, words):
    refused(run('explain', scene, *args, '--system', 'answer', '--weights', vlc_weights), *words)


def test_the_wrong_kind_of_weights(run, scene, open_weights, vlc_weights):
    refused(run('explain', scene, '--weights', vlc_weights), vlc_weights)
    refused(run('explain', scene, QUESTION, '--system', 'answer', '--weights', open_weights), open_weights)


# ---- with the bundled weights ----

def test_a_fresh_process(tmp_path, gallery):
    r = subprocess.run([vl_tutor, 'explain', str(gallery.files[3]), '--out', 'why.png', '--json'], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert r.returncode == 0 and r.stderr == 'wrote why.png\n' and Image.open(tmp_path/'why.png').width > 400, r.stderr
    assert ' '.join(row['word'] for row in json.loads(r.stdout)) == gallery.captions[3]


@pytest.mark.parametrize('system', ['caption', 'answer'])
def test_the_bundled_weights_point_at_things(run, gallery, system):
    "What was learned counts here and nowhere else: each colour word comes from the thing of its colour, give or take half a patch"
    from vl_tutor.world.scenes import World
    from vl_tutor.world.tasks import things
    hits = []
    for i, there in enumerate(things(World('pair', 'test').scenes(range(6)))):
        words = [x for t in there for x in ('--word', t['colour'])]
        for row in rows_of(run('explain', gallery.files[i], gallery.captions[i], '--system', system, '--target', 'words', *words, '--json')):
            x, y = 8*row['column'] + 4, 8*row['row'] + 4
            hits.append(any(l - 4 <= x <= r + 4 and t - 4 <= y <= b + 4 for l, t, r, b in (t['box'] for t in there if t['colour'] == row['word'])))
    assert len(hits) >= 12 and sum(hits)/len(hits) > .6, hits


@pytest.mark.parametrize('system', ['captioner', 'words', 'match', 'answer'])
def test_the_defaults_are_the_winners_of_the_standings(system):
    "On the scenes kept aside for choosing: most hits on the own thing, less those on the other"
    from vl_tutor.explain.standings import read_standings
    run, = (r for r in read_standings() if (r['system'], r['weights'], r['seed']) == (system, 'trained', 0))
    lead, way = max(((own - other, dict(method=method, **way)) for method, rows in run["choices"].items() for way, own, other in rows), key=lambda row: row[0])
    tool = load_captioner() if system == 'captioner' else load_vlc()
    how = tool.pointing() if system == 'captioner' else tool.pointing(system)
    if how['layer'] < 0: how['layer'] += len(tool.model.gated)
    assert how == way, (how, way, lead)


def test_the_pages_say_what_was_counted():
    "The sentences under the maps are numbers of the record, on scenes that nothing was chosen on"
    from vl_tutor.demos.answering import CLEAR, REASON
    from vl_tutor.demos.captioning import BELIEVE
    from vl_tutor.explain.standings import read_standings
    runs = {r['system']: r['scores'] for r in read_standings() if (r['weights'], r['seed']) == ('trained', 0)}
    hits = lambda system, method, name='own': runs[system][method][name][0]
    own, other = map(int, re.findall(r'(\d+)\s+times', BELIEVE))
    assert abs(own - 100*hits('captioner', 'attention')) < 1 and abs(other - 100*hits('captioner', 'attention', 'other')) < 1
    assert 'four times out of five' in CLEAR and abs(hits('words', 'attention') - 4/5) < .05
    assert 'two times out of three' in REASON and abs(hits('answer', 'attention_gradcam') - 2/3) < .05
