"What each command does when the request is right"
import json
import re
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image

COMMANDS = ('caption', 'answer', 'retrieve', 'explain', 'evaluate', 'train', 'finetune', 'demo', 'convert')
vl_tutor = [str(Path(sys.executable).parent/'vl-tutor')]


def shell(*args, **kwargs): return subprocess.run([*vl_tutor, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


# ---- help and version, as a user types them ----

def test_version():
    import vl_tutor as package
    assert shell('--version').stdout.strip() == f'vl-tutor {package.__version__}'


def test_help_names_every_command():
    r = shell('--help')
    assert r.returncode == 0 and not r.stderr
    assert all(re.search(rf'\b{c}\b', r.stdout) for c in COMMANDS) and 'Exit codes' in r.stdout
    assert shell().stdout == r.stdout, 'without anything: the same help'


@pytest.mark.parametrize('command', COMMANDS)
def test_help_teaches(run, command):
    r = run(command, '--help')
    assert r.code == 0 and 'Examples' in r.out and f'vl-tutor {command}' in r.out and '--help' in r.out
    assert '\b' not in r.out and '[bold]' not in r.out


def test_help_is_quick():
    code = "import sys; from vl_tutor.demos.command_line import main\ntry: main(['--help'])\nexcept SystemExit: pass\nheavy = {'torch', 'gradio', 'transformers', 'fastai', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr


# ---- caption ----

def test_scene_and_digits_with_the_bundled_weights(tmp_path):
    "The main job: files on disk, in a fresh process, with what comes in the package"
    from vl_tutor.world.scenes import World
    truth = {}
    for name, skin, number in (('scene.png', 'shapes', 3), ('digits.png', 'digits', 3)):
        sample = World('pair', 'test', skin=skin)[number]
        Image.fromarray(sample['image'].permute(1, 2, 0).numpy()).save(tmp_path/name)
        truth[name] = sample['caption']
    r = shell('caption', 'scene.png', 'digits.png', '--json', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert {row['file']: row['caption'] for row in json.loads(r.stdout)} == truth and not r.stderr


@pytest.mark.parametrize('decoding', ['greedy', 'beam', 'nucleus', 'published-beam'])
def test_decodings_are_the_tools(run, weights, pictures, decoding):
    from vl_tutor.recipes.captioner import load_captioner
    r = run('caption', pictures['scene.png'], '--weights', weights, '--decoding', decoding, '--beam', 3, '--seed', 5, '--max-words', 7, '--json')
    said, = load_captioner(weights).caption([pictures['scene.png']], decoding=decoding.replace('-', '_'), width=3, seed=5, max_words=7)
    row, = json.loads(r.out)
    assert r.code == 0 and row['caption'] == said.text and row['words'] == said.words and row['score'] == pytest.approx(said.score, abs=1e-3)


def test_every_kind_of_file(run, weights, pictures):
    r = run('caption', *pictures.values(), '--weights', weights, '--json')
    assert r.code == 0, r.err
    rows = {Path(row['file']).name: row['caption'] for row in json.loads(r.out)}
    assert list(rows) == list(pictures)
    same = ('scene.png', 'scene.bmp', 'scene.webp', 'alpha.png')
    assert len({rows[n] for n in same}) == 1, 'the same pixels in another file are another caption'


def test_every_kind_of_file_is_captioned_right(run, pictures):
    "With the bundled weights: what the scene shows, whatever the file; without colours at least the same from 8 and from 16 bits"
    from vl_tutor.world.scenes import World
    r = run('caption', *pictures.values(), '--json')
    said = {Path(row['file']).name: row['caption'] for row in json.loads(r.out)}
    colourless = ('grey.png', 'sixteen.png', 'bit.png')
    assert {name: text for name, text in said.items() if name not in colourless} == {name: World('pair', 'test')[3]['caption'] for name in pictures if name not in colourless}
    assert said['grey.png'] == said['sixteen.png']


@pytest.mark.parametrize('one, other', [('grey.png', 'sixteen.png'), ('scene.png', 'palette.png'), ('scene.jpg', 'cmyk.jpg')])
def test_kinds_of_files_look_alike(pictures, one, other):
    from vl_tutor.data.images import open_image
    a, b = (np.asarray(open_image(pictures[n])).astype(int) for n in (one, other))
    assert abs(a - b).mean() < 8


def test_one_line_each(run, weights, pictures):
    files = [pictures['scene.png'], pictures['grey.png']]
    r = run('caption', *files, '--weights', weights)
    assert [line.split(': ')[0] for line in r.out.splitlines()] == [str(f) for f in files] and not r.err


def test_many_pictures_are_captioned_as_one_by_one(run, weights, pictures):
    r = run('caption', *[pictures['scene.png']]*18, pictures['grey.png'], '--weights', weights, '--max-words', 5, '--json')
    rows = json.loads(r.out)
    assert len(rows) == 19 and len({row['caption'] for row in rows[:18]}) == 1


def test_maps_are_drawn(run, weights, pictures, tmp_path):
    r = run('caption', pictures['scene.png'], '--weights', weights, '--maps', tmp_path/'where.png')
    assert r.code == 0 and str(tmp_path/'where.png') in r.err and 'where.png' not in r.out
    assert Image.open(tmp_path/'where.png').size[0] > 300


def photographs():
    import skimage.data
    import sklearn.datasets
    return [Path(sklearn.datasets.__file__).parent/'images'/'china.jpg', Path(skimage.data.__file__).parent/'astronaut.png']


def test_a_photograph(run, weights):
    photos = [p for p in photographs() if p.exists()]
    assert photos, 'scikit-learn brings china.jpg'
    r = run('caption', *photos, '--weights', weights)
    assert r.code == 0 and len(r.out.splitlines()) == len(photos)


# ---- CLIP and GPT-2 as transformers saves them ----

def test_towers_with_a_released_bridge(run, clip, gpt2, released, pictures):
    from vl_tutor.recipes.captioner import load_towers
    r = run('caption', pictures['scene.png'], '--vision', clip, '--language', gpt2, '--checkpoint', released, '--decoding', 'greedy', '--max-words', 6, '--json')
    assert r.code == 0 and not r.err, r.err
    said, = load_towers(clip, gpt2, checkpoint=released).caption([pictures['scene.png']], decoding='greedy', max_words=6)
    assert json.loads(r.out)[0]['caption'] == said.text


def test_towers_without_a_bridge_say_so(run, clip, gpt2, pictures):
    r = run('caption', pictures['scene.png'], '--vision', clip, '--language', gpt2, '--max-words', 3)
    assert r.code == 0 and 'untrained' in r.err and len(r.out.splitlines()) == 1


def test_towers_in_a_fresh_process(clip, gpt2, released, pictures):
    r = shell('caption', pictures['scene.png'], '--vision', clip, '--language', gpt2, '--checkpoint', released, '--max-words', 3)
    assert r.returncode == 0 and not r.stderr and r.stdout.startswith(str(pictures['scene.png'])), r.stderr


# ---- evaluate ----

def test_evaluate(run, weights):
    from vl_tutor.recipes.captioner import evaluate_captioner, load_captioner
    from vl_tutor.world.scenes import World
    r = run('evaluate', '--weights', weights, '-n', 20, '--skin', 'digits', '--json')
    scores = evaluate_captioner(load_captioner(weights), World('pair', 'test', skin='digits'), 20)
    found = json.loads(r.out)
    assert r.code == 0 and {k: found[k] for k in scores} == scores and found['scenes'] == 20
    lines = run('evaluate', '--weights', weights, '-n', 20, '--shuffled').out
    assert 'exact' in lines and 'shuffled  True' in lines


# ---- convert ----

def test_there_and_back(run, tmp_path, weights, model):
    from safetensors.torch import load_file
    from vl_tutor.models.captioner import captioner_keys
    r = run('convert', weights, tmp_path/'theirs.safetensors', '--json')
    theirs = load_file(tmp_path/'theirs.safetensors')
    assert r.code == 0 and json.loads(r.out)['tensors'] == len(theirs)
    assert set(theirs) == set(captioner_keys(model.config).to_official(model.state_dict()))
    r = run('convert', tmp_path/'theirs.safetensors', tmp_path/'ours', '--config', weights/'card.json')
    assert r.code == 0, r.err
    ours, first = load_file(tmp_path/'ours'/'model.safetensors'), load_file(weights/'model.safetensors')
    assert set(ours) == set(first) and all(torch.equal(ours[k], first[k]) for k in first)


def test_released_sizes_are_read(run, tmp_path):
    "A golden model of the authors' own code, with the sizes that lie beside it"
    golden = Path(__file__).parents[1]/'golden'/'captioner'/'model_full_image'
    r = run('convert', golden/'weights.safetensors', tmp_path/'ours', '--config', golden/'config.json')
    assert r.code == 0, r.err
    assert {p.name for p in (tmp_path/'ours').iterdir()} == {'model.safetensors', 'card.json'}


# ---- train ----

@pytest.fixture(scope='module')
def towers(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    for part in ('vision', 'language'):
        r = run('train', part, folder/part, '--samples', 128, '--json')
        assert r.code == 0, r.err
        assert json.loads(r.out)['folder'] == str(folder/part)
    return folder


def test_train_all_three_then_caption(run, towers, pictures):
    r = run('train', 'captioner', towers/'captioner', '--samples', 128, '--vision', towers/'vision', '--language', towers/'language')
    assert r.code == 0 and 'trained captioner' in r.out, r.err
    assert (towers/'captioner'/'log.csv').stat().st_size
    r = run('caption', pictures['scene.png'], '--weights', towers/'captioner')
    assert r.code == 0 and len(r.out.splitlines()) == 1


def test_a_run_is_not_started_twice(run, towers):
    from safetensors.torch import load_file
    file = towers/'vision'/'model.safetensors'
    before, first = file.read_bytes(), load_file(file)
    r = run('train', 'vision', towers/'vision', '--samples', 128)
    assert r.code == 2 and '--resume' in r.err and file.read_bytes() == before
    r = run('train', 'vision', towers/'vision', '--samples', 128, '--resume')
    assert r.code == 0 and all(torch.equal(t, first[k]) for k, t in load_file(file).items()), 'a finished run has nothing left to do'


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    import signal
    args = ['train', 'language', tmp_path/'pen', '--samples', 300_000]
    p = subprocess.Popen([*vl_tutor, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):                                        # the log's folder is made when training begins
        if (tmp_path/'pen').exists() or p.poll() is not None: break
        time.sleep(.1)
    time.sleep(3)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 1 and '--resume' in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1, (p.returncode, err)
    assert (tmp_path/'pen'/'run'/'checkpoint.safetensors').exists() and not (tmp_path/'pen'/'model.safetensors').exists()


def test_the_preset_is_what_made_the_bundled_weights():
    "The card's commands would make them again: the same sizes, lengths, rates"
    from dataclasses import asdict
    from vl_tutor.demos.jobs import PARTS, presets
    from vl_tutor.recipes.captioner import load_captioner
    tool, preset = load_captioner(), presets()['bundled']
    assert tool.model.config == preset['config']
    assert {part: tool.card['made'][part]['recipe'] for part in PARTS} == {part: asdict(preset['recipes'][part]) for part in PARTS}
    for part in PARTS:
        for name, value in preset['more'].get(part, {}).items(): assert tool.card['made'][part][name] == value
    assert [c.split()[2] for c in tool.card['commands']] == list(PARTS) and all('--preset bundled' in c for c in tool.card['commands'])
