"Ask, find, train and score a VLC from a terminal; what is wrong is one sentence and exit code 2"
import json
import re
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from vl_tutor.recipes.vlc import load_vlc

vl_tutor = str(Path(sys.executable).parent/'vl-tutor')


@pytest.fixture(scope='module')
def tool(vlc_weights): return load_vlc(vlc_weights)


def refused(r, *words):
    assert r.code == 2, (r.code, r.out, r.err)
    assert not r.out and r.err.startswith('vl-tutor: ') and len(r.err.strip().splitlines()) == 1 and 'Traceback' not in r.err, r.err
    for word in words: assert str(word) in r.err, f'{word} is not named: {r.err}'


# ---- answer ----

def test_answer_is_the_tools(run, vlc_weights, gallery, tool):
    r = run('answer', *gallery.files[:3], 'Is there a ring?', '--weights', vlc_weights, '--top', 4, '--json')
    assert r.code == 0 and not r.err, r.err
    rows = json.loads(r.out)
    told = tool.answer(gallery.files[:3], ['Is there a ring?']*3, top=4)
    assert [row['file'] for row in rows] == list(map(str, gallery.files[:3]))
    for row, answer in zip(rows, told):
        assert row['answer'] == answer.text and row['probability'] == pytest.approx(answer.probability, abs=1e-4) and len(row['choices']) == 4
        assert [c['answer'] for c in row['choices']] == [word for word, _ in answer.choices] and 'blind' not in row['choices'][0]


def test_blind_is_the_desks(run, vlc_weights, gallery, tool):
    from vl_tutor.demos.answer_desk import AnswerDesk
    r = run('answer', gallery.files[0], 'how many rings are there ?', '--weights', vlc_weights, '--blind', '--json')
    unseen = AnswerDesk(tool).unseen('how many rings are there ?')
    for choice in json.loads(r.out)[0]['choices']: assert choice['blind'] == pytest.approx(unseen[choice['answer']], abs=1e-4)
    lines = run('answer', gallery.files[0], 'how many rings are there ?', '--weights', vlc_weights, '--blind', '--top', 2).out.splitlines()
    assert lines[0].startswith(f'{gallery.files[0]}: ') and lines[1].split() == ['seen', 'blind'] and len(lines) == 4
    assert re.fullmatch(r'  [ \d.]{6}  [ \d.]{6}  \w+', lines[2])


def test_top_1_is_a_line(run, vlc_weights, gallery):
    r = run('answer', *gallery.files[:2], 'is it red ?', '--weights', vlc_weights, '--top', 1)
    assert r.code == 0 and len(r.out.splitlines()) == 2


def test_a_statement_about_two(run, vlc_weights, gallery, tool):
    words = [*gallery.files[:2], 'both pictures show a ring', '--pair', '--weights', vlc_weights]
    found = json.loads(run('answer', *words, '--blind', '--json').out)
    p, = tool.judge([gallery.files[:2]], ['both pictures show a ring'])
    assert found['probability'] == pytest.approx(p, abs=1e-4) and found['true'] == (p > .5) and 0 < found['blind'] < 1
    assert run('answer', *words).out.startswith('true (' if p > .5 else 'false (')


# ---- retrieve ----

def test_retrieve_is_the_tools(run, vlc_weights, gallery, tool):
    r = run('retrieve', gallery.captions[2], gallery.folder, '--weights', vlc_weights, '--top', 0, '--json')
    assert r.code == 0 and not r.err, r.err
    rows, scores = json.loads(r.out), tool.scores(gallery.files, [gallery.captions[2]])[:, 0].tolist()
    assert sorted(row['file'] for row in rows) == sorted(map(str, gallery.files)) and [row['place'] for row in rows] == list(range(1, 7))
    assert [row['score'] for row in rows] == sorted((row['score'] for row in rows), reverse=True)
    for row in rows: assert row['score'] == pytest.approx(scores[gallery.files.index(Path(row['file']))], abs=2e-4)


def test_files_and_folders_name_a_picture_once(run, vlc_weights, gallery):
    r = run('retrieve', 'a red ring', gallery.files[4], gallery.folder/'more', '--weights', vlc_weights)
    assert len(r.out.splitlines()) == 2 and run('retrieve', 'a red ring', gallery.folder, '--weights', vlc_weights, '--top', 2).out.count('\n') == 2


def test_the_other_direction(run, vlc_weights, gallery, tool):
    r = run('retrieve', '--picture', gallery.files[0], gallery.texts, '--weights', vlc_weights, '--json')
    rows, scores = json.loads(r.out), tool.scores([gallery.files[0]], gallery.captions)[0]
    assert [row['text'] for row in rows] == [gallery.captions[i] for i in scores.argsort(descending=True, stable=True).tolist()] or len(set(scores.tolist())) < 6
    assert {row['text'] for row in rows} == set(gallery.captions) and rows[0]['score'] == pytest.approx(scores.max().item(), abs=1e-4)


# ---- train and evaluate ----

@pytest.fixture(scope='module')
def lessons(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'vlc'
    r = run('train', 'vlc', folder, '--samples', 64, '--json')
    assert r.code == 0, r.err
    assert json.loads(r.out)['folder'] == str(folder/'lessons')
    return folder


def test_train_then_ask(run, lessons, gallery):
    r = run('answer', gallery.files[0], 'is there a ring ?', '--weights', lessons/'lessons')
    assert r.code == 0 and (lessons/'captions'/'log.csv').stat().st_size, r.err


def test_a_run_is_not_started_twice(run, lessons):
    from safetensors.torch import load_file
    file = lessons/'lessons'/'model.safetensors'
    before, first = file.read_bytes(), load_file(file)
    refused(run('train', 'vlc', lessons, '--samples', 64), '--resume')
    assert file.read_bytes() == before
    r = run('train', 'vlc', lessons, '--samples', 64, '--resume')
    assert r.code == 0 and all(torch.equal(t, first[k]) for k, t in load_file(file).items()), 'a finished run has nothing left to do'


def test_evaluate(run, vlc_weights):
    r = run('evaluate', '--system', 'vlc', '--weights', vlc_weights, '-n', 40, '--gallery', 6, '--json')
    assert r.code == 0, r.err
    found = json.loads(r.out)
    assert set(found['questions']['all']) == {'seen', 'shuffled', 'text', 'majority', 'n'} and found['questions']['all']['n'] == 40
    assert set(found['pairs']) == {'seen', 'shuffled', 'text', 'n'} and found['retrieval']['n'] == 6 and found['skin'] == 'shapes'
    assert found['retrieval']['chance'] == pytest.approx(1/6) and {'R@1', 'R@5'} <= set(found['retrieval']['text_to_picture'])
    assert sum(row['n'] for kind, row in found['questions'].items() if kind != 'all') == 40


def test_the_evaluation_as_a_table():
    from vl_tutor.demos.world_commands import score_table
    row = dict(seen=.9, shuffled=.4, text=.45, majority=.3, n=100)
    lines = score_table(dict(questions=dict(all=row, count=row), pairs=dict(seen=.8, shuffled=.5, text=.5, n=90),
                             retrieval=dict(text_to_picture={'R@1': .8, 'R@5': .9}, picture_to_text={'R@1': .7}, chance=.01, n=100)))
    assert lines[0].split() == ['seen', 'shuffled', 'text', 'majority', 'n'] and lines[3].split() == ['pairs', '0.800', '0.500', '0.500', '90']
    assert lines[-2] == 'text → picture of 100:  R@1 0.800  R@5 0.900  (chance 0.010)' and len({len(line) for line in lines[:4]}) == 1


# ---- mistakes ----

@pytest.mark.parametrize('args, words', [
    (['answer', 'is it red ?'], ['is it red ?', 'all there is']), (['answer', '{p}'], ['0.png', 'all there is']), (['answer', '{p}', '{p}'], ['0.png', 'question comes last']),
    (['answer', '{p}', ' '], ['question is empty']), (['answer', '{p}', 'is it red ?', '--top', '0'], ['--top 0']), (['answer', 'gone.png', 'is it red ?'], ['gone.png', 'does not exist']),
    (['answer', '{p}', 'a ring in both', '--pair'], ['--pair', 'two pictures, not 1']), (['answer', '{p}', '{p}', '--pair'], ['statement comes last']), (['answer', '{t}', 'is it red ?'], ['captions.txt', 'not a JPEG']),
    (['answer', '{p}', 'very '*90 + 'red ?'], ['tokens', 'at most']), (['retrieve', 'a ring'], ['a ring', 'all there is']), (['retrieve', '{p}', '{p}'], ['0.png', 'sentence comes first']),
    (['retrieve', 'a ring', 'no/gallery'], ['no/gallery', 'does not exist']), (['retrieve', 'a ring', '{e}'], ['empty', 'holds no']), (['retrieve', 'a ring', '{p}', '--top', '-1'], ['--top -1']),
    (['retrieve', '', '{p}'], ['sentence is empty']), (['retrieve', 'ring '*200, '{p}'], ['tokens', 'at most']), (['retrieve', '--picture', '{p}', 'gone.txt'], ['gone.txt']), (['retrieve', '--picture', 'gone.png', '{t}'], ['gone.png', 'does not exist']),
    (['retrieve', '--picture', '{p}', '{p}'], ['0.png', 'is no text']), (['retrieve', '--picture', '{p}', '{n}'], ['nothing.txt', 'no sentence'])],
    ids=lambda v: ' '.join(v)[:40] if isinstance(v, list) and '{' in ' '.join(v) else '')
def test_bad_requests(run, gallery, vlc_weights, tmp_path, args, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty').mkdir()
    (tmp_path/'nothing.txt').write_text('\n\n')
    names = dict(p=gallery.files[0], t=gallery.texts, e=tmp_path/'empty', n=tmp_path/'nothing.txt')
    refused(run(*[a.format(**names) for a in args], '--weights', vlc_weights), *words)


@pytest.mark.parametrize('args, words', [
    (['answer', '{p}', 'is it red ?', '--weights', 'no/such'], ['--weights', 'no/such', 'does not exist']), (['answer', '{p}', 'is it red ?', '--weights', '{f}'], ['card.json']),
    (['train', 'vlc', 'x', '--level', 'one'], ['--level']), (['train', 'vlc', 'x', '--preset', 'huge'], ['huge', 'minute']), (['train', 'vlc', 'x', '--samples', '-1'], ['-1']),
    (['train', 'vlc', 'x', '--resume'], ['x', 'no run']), (['train', 'wings', 'x'], ['wings', 'vlc']), (['evaluate', '--system', 'wings'], ['wings', 'captioner', 'vlc']),
    (['evaluate', '--system', 'vlc', '--shuffled'], ['--shuffled']), (['evaluate', '--system', 'vlc', '--gallery', '1'], ['--gallery 1']), (['evaluate', '--system', 'vlc', '-n', '0'], ['-n 0']),
    (['demo', '--page', 'shop'], ['shop', 'caption', 'answer']), (['demo', '--page', 'answer', '--weights', '{f}'], ['--vlc']), (['demo', '--page', 'caption', '--vlc', '{f}'], ['--vlc']),
    (['demo', '--page', 'answer', '--vlc', 'no/such'], ['--vlc', 'no/such'])], ids=lambda v: ' '.join(v)[:40] if isinstance(v, list) and len(v) > 2 else '')
def test_bad_options(run, gallery, tmp_path, args, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'hollow').mkdir()
    refused(run(*[a.format(p=gallery.files[0], f=tmp_path/'hollow') for a in args]), *words)
    assert [p.name for p in tmp_path.iterdir()] == ['hollow']


def test_a_model_without_the_head_says_so(run, gallery, tmp_path):
    from vl_tutor.models.vlc import VLC, init_vlc
    from vl_tutor.recipes.train_vlc import TINY
    from vl_tutor.training.checkpoints import save_model
    from vl_tutor.world.tasks import task_tokenizer
    from dataclasses import replace
    words = task_tokenizer()
    save_model(init_vlc(VLC(replace(TINY, vocab_size=words.vocab_size, tasks=('itm',))), 0), tmp_path/'bare', {})
    words.save(tmp_path/'bare')
    refused(run('answer', gallery.files[0], 'is it red ?', '--weights', tmp_path/'bare'), 'vqa', 'itm')
    assert run('retrieve', 'a red ring', gallery.folder, '--weights', tmp_path/'bare').code == 0, 'matching is enough to compare'


# ---- with the bundled weights, in a fresh process ----

def test_the_bundled_weights_answer_and_find(gallery):
    "The main jobs with what comes in the package; the one test here that depends on what was learned"
    ask = subprocess.run([vl_tutor, 'retrieve', gallery.captions[2], str(gallery.folder), '--top', '1'], capture_output=True, text=True, timeout=300)
    assert ask.returncode == 0 and not ask.stderr and str(gallery.files[2]) in ask.stdout, ask.stderr
    ask = subprocess.run([vl_tutor, 'answer', str(gallery.files[0]), 'is there a triangle ?', '--blind'], capture_output=True, text=True, timeout=300)
    assert ask.returncode == 0 and not ask.stderr and ask.stdout.startswith(f'{gallery.files[0]}: '), ask.stderr
