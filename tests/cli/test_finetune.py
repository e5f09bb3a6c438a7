"Your own pictures from a terminal: what is learned, what is kept aside, and what is said when something is wrong."
import csv
import json
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vl_tutor.data.folders import drawn_split
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.own_pictures import agreement, more_words, photo_batches, read_pictures, tidy
from vl_tutor.world.scenes import World


@pytest.fixture(scope='session')
def album(tmp_path_factory):
    "Sixty small pictures and a CSV in words of its own"
    folder = tmp_path_factory.mktemp('album')
    batch = World('one', 'test', seed=3).batch(range(60))
    with open(folder/'list.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(['file', 'caption'])
        for i, (pixels, text) in enumerate(zip(batch['image'], batch['caption'])):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder/f'{i:02}.png')
            rows.writerow([f'{i:02}.png', f'Voilà, {text}!'])
    return folder


def test_it_learns_new_words_and_keeps_pictures_aside(run, album, weights, tmp_path):
    r = run('finetune', album, tmp_path/'mine', '--weights', weights, '--samples', 300, '--json')
    assert r.code == 0, r.err
    card = json.loads(r.out)
    valid = [i for i in range(60) if drawn_split(f'{i:02}.png') == 'valid']
    assert card['kept_aside'] == len(valid) and card['pictures'] == sum(drawn_split(f'{i:02}.png') == 'train' for i in range(60))
    assert set(card['scores']) == {'captioner', 'shuffled', 'commonest'} and card['broken'] == 0
    tool = load_captioner(tmp_path/'mine')
    assert tool.tokenizer.decode(tool.tokenizer.encode(['voilà , a !'])[0]) == ['voilà , a !']
    said = run('caption', album/'00.png', '--weights', tmp_path/'mine', '--decoding', 'greedy')
    assert said.code == 0 and 'voilà' in said.out          # 300 pictures are enough for the word that every caption starts with


def test_a_run_is_not_started_twice_and_ends_where_it_ended(run, album, weights, tmp_path):
    args = 'finetune', album, tmp_path/'mine', '--weights', weights, '--samples', 60
    assert run(*args).code == 0
    before = load_file(tmp_path/'mine'/'model.safetensors')
    r = run(*args)
    assert r.code == 2 and '--resume' in r.err
    assert run(*args, '--resume').code == 0
    after = load_file(tmp_path/'mine'/'model.safetensors')
    assert after.keys() == before.keys() and all(after[k].equal(before[k]) for k in before)


@pytest.mark.parametrize('more, words', [
    (['--format', 'nonsense'], ['nonsense']), (['--split', 'nonsense'], ['nonsense']), (['--samples', 0], ['--samples']),
    (['--lr', -1], ['--lr']), (['--weights', 'nowhere'], ['nowhere']), (['--format', 'coco'], [])])
def test_mistakes_are_one_sentence(run, album, tmp_path, more, words):
    r = run('finetune', album, tmp_path/'mine', *more)
    assert r.code == 2 and not r.out and len(r.err.strip().splitlines()) == 1 and r.err.startswith('vl-tutor: ')
    assert all(w in r.err for w in words)
    assert not (tmp_path/'mine').exists()


def test_a_broken_picture_is_named_or_counted(run, album, weights, tmp_path):
    copy = tmp_path/'copy'
    copy.mkdir()
    for file in album.iterdir(): (copy/file.name).write_bytes(file.read_bytes())
    bad = next(f'{i:02}.png' for i in range(60) if drawn_split(f'{i:02}.png') == 'train')
    (copy/bad).write_bytes((copy/bad).read_bytes()[:60])
    r = run('finetune', copy, tmp_path/'a', '--weights', weights, '--samples', 60)
    assert r.code == 2 and bad in r.err and 'list.csv, line' in r.err
    r = run('finetune', copy, tmp_path/'b', '--weights', weights, '--samples', 60, '--skip-broken')
    assert r.code == 0 and '1 broken records left out' in r.out


# ---- the pieces ----

def test_new_rows_leave_old_captions_alone(album):
    tool = load_captioner()
    table, _ = read_pictures(album)
    grown = more_words(tool, [c for cs in table.columns['captions'] for c in cs])
    assert grown.tokenizer.vocab_size == tool.tokenizer.vocab_size + 2                  # voilà and !
    ids, _ = tool.tokenizer.encode(['a small red circle'])
    assert grown.tokenizer.encode(['a small red circle'])[0].equal(ids)
    picture = torch.zeros(1, 1, 3, 48, 48)
    n = tool.tokenizer.vocab_size
    assert torch.allclose(grown.model(picture, ids)[..., :n], tool.model(picture, ids)[..., :n], atol=1e-5)


def test_every_caption_of_a_picture_is_shown():
    from vl_tutor.training.learner import Table
    tool = load_captioner()
    table = Table(image=torch.zeros(2, 3, 48, 48, dtype=torch.uint8), captions=[['a red circle', 'a blue circle', 'a green circle'], ['a star']])
    prepare = photo_batches(table, tool.tokenizer)
    seen = {tool.tokenizer.decode(prepare(torch.tensor([0] + [1]*k))['ids'])[0] for k in range(24)}
    assert seen == set(table.columns['captions'][0])
    assert prepare(torch.tensor([0, 1]))['ids'].equal(prepare(torch.tensor([0, 1]))['ids'])


def test_tidy():
    assert tidy("Two dogs; it's 3,5 m -- café!") == "two dogs ; it' s 3,5 m - - café !"
    assert tidy('') == ''


def test_agreement_and_baselines():
    assert agreement(['a b', 'c'], [['a b'], ['d']])['exact'] == .5
    with pytest.raises(ValueError): read_pictures('nowhere')
