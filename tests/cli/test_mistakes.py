"What is wrong is said in one sentence that names it: exit code 2, nothing on stdout, nothing written"
import os
import shutil
import socket
from pathlib import Path
import pytest
import torch
from PIL import Image


def snapshot(folder): return {p.relative_to(folder): p.stat().st_size for p in Path(folder).rglob('*')}


def refused(r, *words):
    assert r.code == 2, (r.code, r.out, r.err)
    assert not r.out and r.err.startswith('vl-tutor: ') and len(r.err.strip().splitlines()) == 1, r.err
    assert 'Traceback' not in r.err and len(r.err) < 8100
    for word in words: assert str(word) in r.err, f'{word} is not named: {r.err}'


@pytest.fixture(scope='module')
def bad(tmp_path_factory):
    "Files that are no pictures, name → path"
    folder = tmp_path_factory.mktemp('bad')
    whole = folder/'whole.jpg'
    Image.effect_noise((200, 200), 60).save(whole)
    (folder/'cut.jpg').write_bytes(whole.read_bytes()[:2000])
    whole.unlink()
    (folder/'text.png').write_text('not a picture')
    (folder/'empty.png').write_bytes(b'')
    Image.new('1', (30_000, 30_000)).save(folder/'bomb.png')
    (folder/'folder.png').mkdir()
    Image.new('RGB', (9, 9)).save(folder/'moving.gif')
    return folder


@pytest.mark.parametrize('name, words', [('gone.png', 'does not exist'), ('text.png', 'not a JPEG'), ('cut.jpg', 'damaged'), ('empty.png', 'empty'),
                                         ('bomb.png', 'million'), ('folder.png', 'folder'), ('moving.gif', 'not a JPEG')])
def test_bad_pictures(run, bad, weights, pictures, tmp_path, name, words):
    before = snapshot(tmp_path)
    refused(run('caption', pictures['scene.png'], bad/name, '--weights', weights, '--maps', tmp_path/'m.png'), bad/name, words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('options, words', [
    (['--beam', 0], ['--beam 0']), (['--beam', -3], ['--beam -3']), (['--beam', 'two'], ['--beam', 'integer']), (['--temperature', 0], ['--temperature 0']),
    (['--temperature', 'nan'], ['--temperature nan']), (['--top-p', 0], ['--top-p 0']), (['--top-p', 1.5], ['--top-p 1.5']), (['--max-words', 0], ['--max-words 0']),
    (['--decoding', 'magic'], ['magic', 'greedy', 'beam', 'nucleus']), (['--maps', 'where.jpg'], ['where.jpg', '.png']), (['--maps', 'no/such/where.png'], ['no/such', 'does not exist']),
    (['--nonsense'], ['--nonsense']), (['--weights', '/no/such'], ['/no/such', 'does not exist']), (['--vision', '.'], ['--language']), (['--language', '.'], ['--vision']),
    (['--checkpoint', 'x.pth'], ['--checkpoint'])], ids=lambda v: ' '.join(map(str, v)) if isinstance(v, list) else '')
def test_bad_options(run, pictures, weights, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [] if '--weights' in options or '--vision' in options or '--language' in options or '--checkpoint' in options else ['--weights', weights]
    refused(run('caption', pictures['scene.png'], *base, *options), *words)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize('args, word', [(['caption'], 'FILE'), (['fly'], 'fly'), (['train', 'wings', 'x'], 'wings'), (['train', 'captioner', 'x'], '--vision'),
    (['train', 'vision', 'x', '--preset', 'huge'], 'huge'), (['train', 'vision', 'x', '--samples', '-1'], '-1'), (['train', 'vision', 'x', '--resume'], 'x'),
    (['evaluate', '-n', '0'], '0'), (['demo', '--port', '0'], '--port 0'), (['demo', '--port', '99999'], '99999'), (['convert', 'gone.pth', 'ours'], 'gone.pth')],
    ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_bad_requests(run, args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run(*args), word)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize('option, value', [('--level', 'sky'), ('--skin', 'cats'), ('--split', 'none')])
def test_bad_worlds(run, weights, option, value):
    refused(run('evaluate', '--weights', weights, '-n', 5, option, value), value)


# ---- weights that are none ----

@pytest.fixture
def copy(weights, tmp_path):
    shutil.copytree(weights, tmp_path/'copy')
    return tmp_path/'copy'


@pytest.mark.parametrize('file, content, words', [('card.json', '{', 'card.json'), ('model.safetensors', 'x'*100, 'model.safetensors'), ('card.json', None, 'card.json'),
                                                  ('model.safetensors', None, 'model.safetensors'), ('tokenizer.json', None, 'tokeni'), ('tokenizer.json', '[]', 'tokeni')])
def test_broken_weights(run, copy, pictures, file, content, words):
    (copy/file).unlink()
    if content is not None: (copy/file).write_text(content)
    refused(run('caption', pictures['scene.png'], '--weights', copy), words)


def test_a_wrong_tokenizer(run, copy, pictures):
    from vl_tutor.primitives.words import WordTokenizer
    WordTokenizer([f'word{k}' for k in range(500)]).save(copy)
    refused(run('caption', pictures['scene.png'], '--weights', copy), 'token', 505)


def test_a_wrong_checkpoint_lists_the_keys(run, tmp_path, weights, model):
    from vl_tutor.models.captioner import captioner_keys
    theirs = captioner_keys(model.config).to_official(model.state_dict())
    theirs['resampler.wings'] = theirs.pop('resampler.latents')
    torch.save(theirs, tmp_path/'wrong.pth')
    before = snapshot(tmp_path)
    refused(run('convert', tmp_path/'wrong.pth', tmp_path/'ours', '--config', weights/'card.json'), 'resampler.wings', 'resampler.latents')
    assert snapshot(tmp_path) == before


def test_a_checkpoint_of_other_towers(run, tmp_path, clip, gpt2, pictures, model):
    from vl_tutor.models.captioner import captioner_keys
    torch.save(captioner_keys(model.config).to_official(model.state_dict()), tmp_path/'other.pth')
    refused(run('caption', pictures['scene.png'], '--vision', clip, '--language', gpt2, '--checkpoint', tmp_path/'other.pth'), 'checkpoint')


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04 broken'])
def test_a_checkpoint_that_is_none(run, tmp_path, content):
    (tmp_path/'x.pth').write_bytes(content)
    refused(run('convert', tmp_path/'x.pth', tmp_path/'ours'), tmp_path/'x.pth')
    assert not (tmp_path/'ours').exists()


def test_a_checkpoint_runs_no_code(run, tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    torch.save(dict(model_state_dict=Evil()), tmp_path/'evil.pth', pickle_module=pickle)
    refused(run('convert', tmp_path/'evil.pth', tmp_path/'ours'), 'evil.pth')
    assert not (tmp_path/'owned').exists()


def test_unpublished_sizes_need_a_config(run, tmp_path):
    golden = Path(__file__).parents[1]/'golden'/'captioner'/'model_full_image'
    refused(run('convert', golden/'weights.safetensors', tmp_path/'ours'), golden/'weights.safetensors', 'unknown', 'xattn_block')
    assert not (tmp_path/'ours').exists()


@pytest.mark.parametrize('content, word', [('{', 'JSON'), ('[]', 'lacks'), ('{"model_cfg": {}}', 'lacks'), ('{"config": {"class": "Wings"}}', 'Wings')])
def test_a_wrong_config(run, tmp_path, weights, content, word):
    (tmp_path/'sizes.json').write_text(content)
    (tmp_path/'t.pth').write_bytes(b'x')
    refused(run('convert', tmp_path/'t.pth', tmp_path/'ours', '--config', tmp_path/'sizes.json'), 'sizes.json' if word != 'Wings' else word, word)


def test_nothing_is_overwritten(run, tmp_path, weights):
    (tmp_path/'there').mkdir()
    (tmp_path/'there.safetensors').write_text('mine')
    refused(run('convert', weights, tmp_path/'there.safetensors'), 'there.safetensors')
    refused(run('convert', weights, tmp_path/'no.pth'), 'no.pth', '.safetensors')
    assert (tmp_path/'there.safetensors').read_text() == 'mine'


@pytest.mark.parametrize('swap', [False, True])
def test_towers_of_the_wrong_kind(run, clip, gpt2, pictures, tmp_path, swap):
    (tmp_path/'hollow').mkdir()
    pair = (gpt2, clip) if swap else (tmp_path/'hollow', gpt2)
    refused(run('caption', pictures['scene.png'], '--vision', pair[0], '--language', pair[1]), pair[0])


def test_a_port_in_use(run, weights):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        r = run('demo', '--weights', weights, '--port', port)
    assert r.code == 2 and str(port) in r.err and 'Traceback' not in r.err
