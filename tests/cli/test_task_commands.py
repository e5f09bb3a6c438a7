"vl-tutor task: trained, scored and written as a user asks for it, and what it says to wrong requests."
import json
import sys
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file
from vl_tutor.recipes.task_data import PUBLISHED, TINY

sys.path.insert(0, str(Path(__file__).parents[1]/'recipes'))
import task_files as files  # noqa: E402


@pytest.fixture(scope='module')
def vlc(tmp_path_factory):
    "A very small VLC of ours"
    from vl_tutor.models.vlc import VLC, VLCConfig, init_vlc
    from vl_tutor.training.checkpoints import save_model
    from vl_tutor.world.tasks import task_tokenizer
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('vlc')/'small'
    save_model(init_vlc(VLC(VLCConfig(32, 16, 16, 1, 2, 32, 192, 24, 0, 0, 1))), folder, {})
    task_tokenizer().save(folder)
    return folder


@pytest.fixture(scope='module')
def asked(tmp_path_factory): return files.vqav2(tmp_path_factory.mktemp('vqa'))


def refused(done, *words):
    assert done.code == 2 and not done.out and done.err.startswith('vl-tutor: ') and done.err.count('\n') == 1, done
    assert 'Traceback' not in done.err and all(str(w) in done.err for w in words), done.err


def test_help_and_recipes(run):
    for command in ([], ['train'], ['evaluate'], ['recipes']):
        done = run('task', *command, '--help')
        assert done.code == 0 and 'Usage' in done.out
    assert 'task' in run('--help').out
    table = json.loads(run('task', 'recipes', '--json').out)
    assert set(table) == {*PUBLISHED, *(f'tiny-{t}' for t in TINY)} and table['vqav2']['image_size'] == 576
    lines = run('task', 'recipes').out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(table) and '576' in lines[1]
    assert '      wrong  15' in run('task', 'recipes', 'coco').out and 'wrong' not in run('task', 'recipes', 'nlvr2').out


def test_train_then_evaluate_then_submit(run, vlc, asked, tmp_path):
    how = 'task', 'train', 'questions', asked, tmp_path/'run', '--format', 'vqav2', '--split', 'train', '--aside', 'val', '--weights', vlc, '--samples', 40
    done = run(*how, '--json')
    card = json.loads(done.out)
    assert done.code == 0 and card['task'] == 'questions' and card['samples'] == 12 and {'all', 'other', 'official'} <= set(card['scores'])
    before = load_file(tmp_path/'run/model.safetensors')
    refused(run(*how), '--resume')
    assert run(*how, '--resume').code == 0
    assert all(torch.equal(t, before[k]) for k, t in load_file(tmp_path/'run/model.safetensors').items())
    scored = run('task', 'evaluate', 'questions', asked, '--format', 'vqav2', '--split', 'val', '--weights', tmp_path/'run')
    lines = scored.out.splitlines()
    assert scored.code == 0 and '12 samples of val' in lines[0] and lines[1].split() == ['seen', 'shuffled', 'majority', 'text', 'of']
    sent = run('task', 'evaluate', 'questions', asked, '--format', 'vqav2', '--split', 'test', '--weights', tmp_path/'run', '--out', tmp_path/'a.json')
    assert sent.code == 0 and 'a.json' in sent.out and len(json.loads((tmp_path/'a.json').read_text())) == 4


def test_retrieval_keeps_its_scores(run, vlc, tmp_path):
    how = 'task', 'evaluate', 'retrieval', 'world', '--weights', vlc, '--level', 'one', '-n', 6, '--scores', tmp_path/'s.npy', '--json'
    first, second = run(*how), run(*how)
    assert first.code == 0 and first.out == second.out and (tmp_path/'s.npy').exists() and 'IR R@1' in json.loads(first.out)['scores']


@pytest.mark.parametrize('args, words', [
    (['train', 'dance', 'world', 'x'], ['dance', 'pairs']), (['train', 'pairs', 'nowhere', 'x'], ['nowhere']), (['train', 'pairs', 'world'], ['RUN']),
    (['train', 'pairs', 'world', 'x', '--weights', 'gone'], ['--weights', 'gone']), (['train', 'pairs', 'world', 'x', '--recipe', 'huge'], ['huge', 'nlvr2']),
    (['train', 'pairs', 'world', 'x', '--recipe', 'coco'], ['retrieval', 'pairs']), (['train', 'pairs', 'world', 'x', '--samples', '-1'], ['--samples']),
    (['train', 'pairs', 'world', 'x', '--resume'], ['x', '--resume']), (['train', 'pairs', 'world', 'x', '--at-once', '5'], ['multiple of 5']),
    (['train', 'pairs', 'world', 'x', '--level', 'sky'], ['sky']), (['evaluate', 'pairs', 'nowhere'], ['nowhere']), (['evaluate', 'pairs', 'world', '-n', '-1'], ['-n -1']),
    (['evaluate', 'pairs', 'world', '--out', 'a.json'], ['--out']), (['evaluate', 'questions', 'world', '--out', 'a.txt'], ['.json']),
    (['evaluate', 'pairs', 'world', '--scores', 's.npy'], ['--scores']), (['evaluate', 'pairs', 'world', '--split', 'sky'], ['sky']), (['recipes', 'huge'], ['huge', 'vqav2'])],
    ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_mistakes(run, vlc, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if '--weights' not in args and args[0] != 'recipes': args = [*args, '--weights', str(vlc)]
    refused(run('task', *args), *words)
    assert not list(tmp_path.iterdir())


def test_an_authors_file_needs_its_words(run, tmp_path):
    (tmp_path/'vlc.ckpt').write_bytes(b'')
    refused(run('task', 'train', 'pairs', 'world', tmp_path/'x', '--weights', tmp_path/'vlc.ckpt'), 'vlc.ckpt', '--tokenizer')


def test_wrong_folders(run, vlc, asked, tmp_path):
    refused(run('task', 'train', 'pairs', asked, tmp_path/'x', '--weights', vlc, '--format', 'vqav2', '--split', 'train'), 'no pairs')
    refused(run('task', 'train', 'pairs', asked, tmp_path/'x', '--weights', vlc, '--format', 'nlvr2'), 'train.json')
    refused(run('task', 'train', 'questions', asked, tmp_path/'x', '--weights', vlc, '--format', 'magic'), 'magic')
    assert not (tmp_path/'x').exists()
