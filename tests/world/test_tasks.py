"Every task of the world: stored bytes, the same for any workers, batch size and order; words, splits and samples keep their promises."
import hashlib
import json
import re
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.training.learner import collate, dict_loaders
from vl_tutor.world import tasks as module
from vl_tutor.world.dice import mix
from vl_tutor.world.drawing import COLOURS, KINDS, SIZES, TEXTURES
from vl_tutor.world.language import MEANING, SYNONYMS, all_captions, canonical, parse, structure
from vl_tutor.world.phrases import plural
from vl_tutor.world.scenes import HELD_OUT, LEVELS, SKINS, SPLITS, WORLD_VERSION, World
from vl_tutor.world.tasks import (HOMES, TASK_VERSION, TASKS, LabelTask, TextOnly, WorldTask, find_scenes, how_many, leader, majority, make_task,
                                  nth_caption, task_tokenizer, task_words, things)

FILE = Path(__file__).parent/'stored_tasks.json'
TYPES = dict(image=torch.uint8, pair=torch.uint8, video=torch.uint8, label=torch.long, box=torch.float, proposals=torch.float,
             caption=str, captions=list, class_name=str, question=str, answer=str, answers=list, scores=list, options=list, tracks=torch.float, kind=str, expression=str, text=str)
settings_stored = ['few/mixed/train/48/1000', 'pair/shapes/train/48/1000', 'crowd/digits/combos/48/60', 'one/mixed/long/48/60', 'few/shapes/backgrounds/64/60']
names = list(HOMES)


def joined(batches):
    "Batches one after the other, without what only helps to look inside (scenes, clips)"
    plain = {k for k, v in batches[0].items() if isinstance(v, torch.Tensor) or isinstance(v, list) and not hasattr(v[0], 'code')}
    return {k: torch.cat([b[k] for b in batches]) if isinstance(batches[0][k], torch.Tensor) else sum((b[k] for b in batches), []) for k in sorted(plain)}


def digest(batch):
    "sha256 of all fields of a batch: names, shapes, bytes"
    sha = hashlib.sha256()
    for name, value in joined([batch]).items():
        if isinstance(value, torch.Tensor): sha.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode() + value.contiguous().numpy().tobytes())
        else: sha.update(f'{name} {json.dumps(value)}'.encode())
    return sha.hexdigest()


def asked(name, setting):
    "The task of a stored digest, and how many samples of it"
    level, skin, split, side, n = setting.split('/')
    return make_task(name, level, split, skin=skin, image_size=int(side), size=int(n)), int(n)


def same(a, b):
    a, b = joined([a]), joined([b])
    assert a.keys() == b.keys()
    for k in a: assert a[k].equal(b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


# ---- the same bytes ----

@pytest.mark.parametrize('setting', settings_stored)
@pytest.mark.parametrize('name', names)
def test_stored_bytes(name, setting):
    "Any change of a byte must come with a new TASK_VERSION (and new digests here: run this file)"
    stored = json.loads(FILE.read_text())
    task, n = asked(name, setting)
    assert (stored['task_version'], stored['world_version']) == (TASK_VERSION, WORLD_VERSION)
    assert digest(task.batch(range(n))) == stored['sha256'][f'{name}/{setting}']


def test_every_task_is_stored():
    assert set(json.loads(FILE.read_text())['sha256']) == {f'{name}/{s}' for name in names for s in settings_stored}


@pytest.mark.parametrize('name', names)
def test_a_new_version_is_another_world(name, monkeypatch):
    before = make_task(name)
    monkeypatch.setattr(module, 'TASK_VERSION', TASK_VERSION + '+')
    assert make_task(name).key != before.key and not set(make_task(name).code(range(200)).tolist()) & set(before.code(range(200)).tolist())


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers,bs', [(0, 1000), (1, 331), (2, 50), (4, 125)])
@pytest.mark.parametrize('name', names)
def test_the_first_thousand_for_any_worker_count_and_batch_size(name, workers, bs):
    task, _ = asked(name, settings_stored[1])
    dls = dict_loaders(task, task, bs=bs, valid_bs=bs, workers=workers, device='cpu')
    assert digest(joined(list(dls.valid))) == json.loads(FILE.read_text())['sha256'][f'{name}/{settings_stored[1]}']


@pytest.mark.parametrize('level,skin', [('few', 'mixed'), ('crowd', 'shapes')])
@pytest.mark.parametrize('name', names)
def test_any_batch_size_and_order(name, level, skin):
    task = make_task(name, level, 'valid', skin=skin, size=24)
    whole = task.batch(range(24))
    for size in (1, 7): same(joined([task.batch(range(i, min(i + size, 24))) for i in range(0, 24, size)]), whole)
    order = mix(torch.arange(24)).argsort().tolist()
    mixed, plain = joined([task.batch(order)]), joined([whole])
    for k, v in plain.items(): assert mixed[k].equal(v[order]) if isinstance(v, torch.Tensor) else mixed[k] == [v[i] for i in order], k
    same(task.batch(torch.tensor([3, 3])), {k: v[[3, 3]] if isinstance(v, torch.Tensor) else [v[3]]*2 for k, v in plain.items()})


@pytest.mark.parametrize('name', names)
def test_training_batches_are_the_rows_of_the_loader(name):
    task = make_task(name, 'few', size=30)
    made = {workers: joined(list(dict_loaders(task, task, bs=10, workers=workers, device='cpu').train)) for workers in (0, 2)}
    same(made[0], made[2])
    order = sum(dict_loaders(task, task, bs=10, device='cpu').train.order(0), [])
    same(made[0], task.batch(order))


def test_same_bytes_for_any_thread_count():
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append([digest(make_task(name, 'crowd', skin='mixed').batch(range(40))) for name in names])
    finally: torch.set_num_threads(before)
    assert made[0] == made[1]


# ---- samples ----

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('name', names)
def test_fields(name, level):
    task = make_task(name, level, skin='mixed', image_size=32, size=12)
    batch, said = task.batch(range(12)), task.texts(range(12))
    assert task.name == name and set(task.fields) <= set(batch) and len(task) == 12 and name in TASKS
    drawn = [k for k in batch if k not in said]                                                  # texts: all but what is drawn
    assert set(said) <= set(batch) and not set(drawn) - {'image', 'pair', 'video', 'tracks'}
    same({k: batch[k] for k in said}, said)
    for field in task.fields:
        value, kind = batch[field], TYPES[field]
        assert len(value) == 12
        assert value.dtype == kind if isinstance(kind, torch.dtype) else all(isinstance(v, kind) for v in value), field
    shown = next(k for k in ('image', 'pair', 'video') if k in batch)
    assert batch[shown].shape == dict(image=(12, 3, 32, 32), pair=(12, 2, 3, 32, 32), video=(12, 8, 3, 32, 32))[shown]


@pytest.mark.parametrize('name', names)
def test_a_sample_is_its_place_in_the_batch(name):
    task = make_task(name, 'few', 'test', size=9)
    batch, samples = task.batch(range(9)), list(task)
    assert len(samples) == 9
    for i, sample in enumerate(samples):
        for k in task.fields:
            assert sample[k].equal(batch[k][i]) if isinstance(batch[k], torch.Tensor) else sample[k] == batch[k][i], k
    same(collate([{k: s[k] for k in task.fields} for s in samples]), {k: batch[k] for k in task.fields})
    assert task[-1][task.fields[-1]] is not None
    with pytest.raises(IndexError): task[9]


@pytest.mark.parametrize('name', names)
def test_every_setting_has_its_own_stream(name):
    mine = make_task(name)
    for other in (dict(seed=1), dict(split='valid'), dict(level='one'), dict(skin='mixed')):
        assert not set(mine.code(range(500)).tolist()) & set(make_task(name, **other).code(range(500)).tolist())
    assert len({make_task(n).key for n in names}) == len(names)


@pytest.mark.parametrize('name', names)
def test_words_do_not_depend_on_the_image_size(name):
    small, large = (joined([make_task(name, 'few', skin='mixed', image_size=s).texts(range(40))]) for s in (48, 96))
    for k, v in small.items():
        if isinstance(v, list): assert v == large[k], k
        elif k != 'tracks': assert large[k].equal(v if v.dtype == torch.long else 2*v), k


# ---- words ----

@pytest.mark.parametrize('name', names)
def test_every_word_is_in_the_vocabulary(name):
    words, known = set(TASKS[name].vocabulary()), set(task_words())
    assert words <= known and known == {w for t in TASKS.values() for w in t.vocabulary()}
    tokens = task_tokenizer()
    for level in ('pair', 'crowd'):
        for split in ('train', 'long'):
            said = make_task(name, level, split, skin='mixed').texts(range(100))
            texts = [t for k in ('caption', 'captions', 'question', 'answer', 'answers', 'expression', 'text', 'class_name') for t in said.get(k, [])]
            texts = [t for part in texts for t in (part if isinstance(part, list) else [part])]
            assert {w for t in texts for w in t.split()} <= words
            assert tokens.unk_id not in tokens.encode(texts)[0] and tokens.decode(tokens.encode(texts[:40])[0]) == texts[:40]


def nouns():
    return {w: n for n in KINDS for s in SYNONYMS.get(n, (n,)) for w in (s, plural(s))}


PAIR = re.compile(f'({"|".join(COLOURS)}) ({"|".join(nouns())})\\b')


def spoken_of(said):
    "Every colour and kind that a batch speaks of in one breath"
    texts = ' . '.join(str(t) for k, v in said.items() if isinstance(v, list) and not hasattr(v[0], 'code') for t in v)
    return {(COLOURS.index(c), KINDS.index(nouns()[w])) for c, w in PAIR.findall(texts)}


@pytest.mark.parametrize('level', ['pair', 'crowd'])
@pytest.mark.parametrize('name', names)
def test_what_is_held_out_is_neither_shown_nor_spoken_of(name, level):
    for split in ('train', 'test'):
        said = make_task(name, level, split, skin='mixed').texts(range(200))
        assert not [(c, k) for c, k in spoken_of(said) if HELD_OUT[k] == c], split
        for scenes in shown_in(said): assert not ((scenes.colour == HELD_OUT[scenes.kind]) & scenes.present).any()


def shown_in(said):
    if 'clips' in said:
        clips = said['clips']
        from dataclasses import replace
        return [clips.first, replace(clips.first, colour=clips.colour)]
    return said['scenes'] if isinstance(said['scenes'], list) else [said['scenes']]


@pytest.mark.parametrize('name', names)
def test_combos_show_what_is_held_out(name):
    said = make_task(name, 'few', 'combos', skin='mixed').texts(range(200))
    held = torch.stack([((s.colour == HELD_OUT[s.kind]) & s.present).any(1) for s in shown_in(said)]).any(0)
    assert held.all() and (name.endswith('label') or [(c, k) for c, k in spoken_of(said) if HELD_OUT[k] == c])


# ---- captions and labels ----

@pytest.mark.parametrize('level,skin,split', [(a, b, c) for a in LEVELS for b in SKINS for c in ('train', 'long')])
def test_caption_number_n(level, skin, split):
    for truth in structure(World(level, split, skin=skin).scenes(range(15))):
        ways = all_captions(truth)
        assert torch.tensor(how_many(truth)).prod() == len(ways)
        for n in range(0, len(ways), max(1, len(ways)//40)): assert nth_caption(truth, n) == ways[n]


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('references', [2, 5, 9])
def test_references_are_true_and_different(level, references):
    for name in ('caption', 'paraphrase'):
        said = make_task(name, level, skin='mixed', references=references).texts(range(200))
        for text, refs, truth in zip(said['caption'], said['captions'], structure(said['scenes'])):
            assert len(set(refs)) == len(refs) == min(references, len(all_captions(truth))) and refs[0] == canonical(truth)
            assert (text == refs[0]) == (name == 'caption') and text in refs
            if len(truth['objects']) != 2: assert all(parse(t) == parse(refs[0]) for t in refs)
            else: assert all(parse(t) == truth for t in refs)


def test_paraphrases_use_the_whole_grammar():
    "Every template and synonym turns up, and none much more often than another"
    said = make_task('paraphrase', 'pair').texts(range(6000))['caption']
    for words in SYNONYMS.values():
        seen = [sum(w in t.split() for t in said) for w in words]
        assert min(seen) > .75*max(seen), (words, seen)


@pytest.mark.parametrize('level,skin', [('one', 'mixed'), ('pair', 'shapes'), ('few', 'digits'), ('crowd', 'mixed')])
def test_labels(level, skin):
    for of in ('kind', 'colour', 'both'):
        task = LabelTask(level, 'test', skin=skin, of=of)
        said = task.texts(range(300))
        for label, name, found in zip(said['label'].tolist(), said['class_name'], things(said['scenes'])):
            big, *others = sorted(found, key=lambda o: -o['r'])
            assert task.classes[label] == name == dict(kind=big['kind'], colour=big['colour'], both=f'{big["colour"]} {big["kind"]}')[of]
            assert all(big['r'] > 1.2*o['r'] for o in others)
    share = torch.bincount(make_task('label', level, skin='shapes').texts(range(3000))['label'])/3000
    assert len(share) == 6 and (share*6 - 1).abs().max() < .2


def test_things_are_what_the_tensors_say():
    s = World('crowd', skin='mixed').scenes(range(40))
    for i, found in enumerate(things(s)):
        assert len(found) == s.present[i].sum()
        for o, thing in enumerate(found):
            assert (thing['kind'], thing['colour'], thing['size'], thing['texture']) == (KINDS[s.kind[i, o]], COLOURS[s.colour[i, o]], SIZES[s.size[i, o]], TEXTURES[s.texture[i, o]])
            assert (thing['x'], thing['y'], thing['r']) == (s.x[i, o].item(), s.y[i, o].item(), s.r[i, o].item())
            assert thing['box'][0] < thing['x'] < thing['box'][2] and thing['box'][1] < thing['y'] < thing['box'][3]


def test_leader_of_equals_is_none():
    size, there = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]).bool()
    who, ok = leader(size, there)
    assert ok.tolist() == [False, True, False, True, True] and who[ok].tolist() == [1, 0, 0]


# ---- blind readers ----

def test_blind_reader_by_hand():
    "Naive Bayes on four texts, worked out with a pencil"
    reader = TextOnly(often=99).fit(['a b', 'a c', 'b c', 'b'], ['x', 'x', 'y', 'y'])
    p = lambda n, total: (n + 1)/(total + 2)
    x, y = (2*p(n['a'], 2)*p(n['a first'], 2) for n in ({'a': 2, 'a first': 2}, {'a': 0, 'a first': 0}))
    row = [reader.rows[f] for f in ('a', ('', 'a'))]
    got = (reader.prior + reader.weight[row].sum(0)).exp()
    assert torch.allclose(got, torch.tensor([x, y], dtype=torch.double)) and reader.guess('a') == 'x' and reader.guess('b') == 'y'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['a b', 'a', 'c a', 'b b']), st.integers(0, 2)), min_size=1, max_size=40))
def test_known_texts_get_their_commonest_answer(rows):
    texts, answers = zip(*rows)
    reader = TextOnly(often=1).fit(texts, answers)
    for text in set(texts):
        told = [a for t, a in rows if t == text]
        assert told.count(reader.predict([text])[0]) == max(map(told.count, told))
    assert reader.accuracy(texts, answers) >= majority(answers, answers)


def test_blind_reader_finds_a_leak():
    code = mix(torch.arange(4000))
    coin = ((code >> 8) % 2).tolist()
    honest, leaky = ([f'is it {"very "*(c & leak)}red ?' for c in coin] for leak in (0, 1))
    assert TextOnly().fit(honest[:2000], coin[:2000]).accuracy(honest[2000:], coin[2000:]) < .55
    assert TextOnly(often=9999).fit(leaky[:2000], coin[:2000]).accuracy(leaky[2000:], coin[2000:]) == 1


# ---- mistakes are answered in words ----

@pytest.mark.parametrize('call,words', [
    (lambda: make_task('poetry'), 'caption, paraphrase'), (lambda: make_task('caption', 'hundred'), 'one, pair, few, crowd'),
    (lambda: make_task('label', of='taste'), "'taste'"), (lambda: make_task('paraphrase', references=1), '1 references are too few'),
    (lambda: make_task('caption', references=0), '0 references'), (lambda: make_task('caption').batch(5), 'sequence'),
    (lambda: TextOnly().fit([], []), '0 texts'), (lambda: TextOnly().fit(['a'], [1, 2]), '1 texts, 2 answers'),
    (lambda: find_scenes(World('one'), [0], lambda found: found['present'].sum(1) > 1, tries=2048), 'no scene that will do')])
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_a_task_without_words_says_so():
    with pytest.raises(NotImplementedError, match='WorldTask'): WorldTask().texts([0])


def test_meanings(): assert set(MEANING) == {w for ways in SYNONYMS.values() for w in ways}


if __name__ == '__main__':      # new digests, to be committed with a new TASK_VERSION
    made = {f'{name}/{s}': digest(asked(name, s)[0].batch(range(asked(name, s)[1]))) for name in names for s in settings_stored}
    FILE.write_text(json.dumps(dict(task_version=TASK_VERSION, world_version=WORLD_VERSION, sha256=made), indent=1) + '\n')
