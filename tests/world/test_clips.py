"Clips: what is said is what is seen, the same bytes for anybody, and neither text nor a single frame tells an answer."
import hashlib
import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch.utils.data import DataLoader
from vl_tutor.world.action import (ABOUT, CLIP_CLASSES, CLIP_LEVELS, CLIP_QUESTIONS, LANE, film, film_action, pick, project, tracks,
                                   unfold)
from vl_tutor.world.clips import (ClipCaptionTask, ClipLabelTask, ClipQuestionTask, answer_ref, clip_captions, clip_words, say, stories,
                                  watch_ref)
from vl_tutor.world.dice import bits, mix
from vl_tutor.world.drawing import draw_ref
from vl_tutor.world.language import MEANING
from vl_tutor.world.scenes import HELD_OUT, SKINS, SPLITS
from vl_tutor.world.tasks import TextOnly, make_task, majority

LEVELS = tuple(CLIP_LEVELS)


def made(level, n=400, split='train', skin='shapes', start=0, **options):
    return film(mix(torch.arange(start, start + n)), CLIP_LEVELS[level], split=split, skin=skin, **options)


# ---- what there is ----

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('skin', SKINS)
def test_scenes_are_whole(level, split, skin):
    clips, _, _ = made(level, 200, split, skin)
    shown, b = unfold(clips), tracks(clips)
    o = b.shape[2]
    assert o in LANE and b.shape == (200, 8, o, 4) and b.min() >= 0 and b.max() <= 48
    there = shown.present.unflatten(0, (200, 8))
    assert ((b[..., 2] > b[..., 0]) == there).all()
    for i in range(o):
        for j in range(i):                                                                  # boxes never touch, in no frame
            both = there[:, :, i] & there[:, :, j]
            gap = torch.maximum(b[:, :, i, :2], b[:, :, j, :2]) - torch.minimum(b[:, :, i, 2:], b[:, :, j, 2:])
            assert (gap.amax(-1)[both] > 0).all()
    held = (shown.colour == HELD_OUT[shown.kind]) & shown.present
    if split == 'combos': assert (clips.first.colour == HELD_OUT[clips.first.kind]).any(1).all()
    else: assert not held.any()                                                             # not even after a change
    named = clips.first.kind*10 + clips.first.colour
    assert all(len(set(row)) == o for row in named.tolist())                                # colour and kind mean one object


def test_frames_are_drawn_as_the_slow_painter_draws_them():
    clips, _, _ = made('crowd', 4, skin='mixed')
    video, shown = project(clips, 48), unfold(clips)
    for i in range(0, 32, 5): assert (video.flatten(0, 1)[i].int() - draw_ref(shown, i, 48).int()).abs().max() <= 1


def test_sizes_and_frames_scale():
    small, large = (ClipQuestionTask('few', image_size=s) for s in (48, 96))
    a, b = small.batch(range(20)), large.batch(range(20))
    assert a['question'] == b['question'] and a['answer'] == b['answer']
    assert torch.allclose(2*a['tracks'], b['tracks'], atol=1e-3)
    longer = ClipQuestionTask('few', frames=16).batch(range(20))
    assert longer['video'].shape == (20, 16, 3, 48, 48)
    assert longer['question'] == a['question'] and longer['answer'] == a['answer']          # the same story, more often looked at
    assert all(answer_ref(q, watch_ref(longer['clips'], k)) == y for k, (q, y) in enumerate(zip(longer['question'], longer['answer'])))
    for wrong in (7, 0, -1):
        with pytest.raises(ValueError, match='at least 8'): ClipCaptionTask(frames=wrong)
        with pytest.raises(ValueError, match='at least 8'): made('pair', 2, frames=wrong)


def test_pick_is_fair():
    free = torch.tensor([[True, False, True, True]]).expand(9000, 4)
    taken = pick(free, bits(mix(torch.arange(9000)), 3))
    assert torch.bincount(taken, minlength=4).tolist()[1] == 0
    assert torch.bincount(taken, minlength=4)[[0, 2, 3]].sub(3000).abs().max() < 200


# ---- what is said ----

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('split, skin', [('train', 'shapes'), ('combos', 'mixed'), ('long', 'digits')])
def test_answers_are_what_the_frames_show(level, split, skin):
    task = ClipQuestionTask(level, split, skin=skin)
    found = task.texts(range(300))
    for i, (question, answer, options) in enumerate(zip(found['question'], found['answer'], found['options'])):
        assert answer_ref(question, watch_ref(found['clips'], i)) == answer and answer in options
    kinds = set(found['kind'])
    alone = {'count', 'order', 'before'} if CLIP_LEVELS[level].longer[1 if split == 'long' else 0] == 1 or (level == 'one' and split != 'long') else set()
    expected = set(CLIP_QUESTIONS) - alone - ({'colour'} if split == 'combos' else set())
    assert kinds == expected


def seen_events(seen, frames=8):
    "Everything that happens, read off the frames"
    events = set()
    for k, o in enumerate(seen):
        if o['steps']:
            f, axis, gone = o['steps'][0]
            events.add((k, 'moves', (('left', 'right'), ('up', 'down'))[axis][gone > 0], ('slowly', 'quickly')[abs(gone)*(frames - 1) > 15]))
        if len(set(o['colours'])) > 1: events.add((k, 'turns', o['colours'][-1]))
        if len(set(o['sizes'])) > 1: events.add((k, 'grows' if o['sizes'][-1] == 'large' else 'shrinks'))
        if o['frames'][0] > 0: events.add((k, 'appears'))
        if o['frames'][-1] < frames - 1: events.add((k, 'vanishes'))
    return events


@pytest.mark.parametrize('level', LEVELS)
def test_stories_are_what_the_frames_show(level):
    clips, _, _ = made(level, 300)
    for i, story in enumerate(stories(clips)):
        told = {(k, 'moves', way, speed) for _, k, way, speed in story['moves']}
        told |= {(k, verb, *([detail] if detail else [])) for _, k, verb, detail in story['others']}
        assert told == seen_events(watch_ref(clips, i))
        starts = [m[0] for m in story['moves']]
        assert starts == sorted(starts) and story['in_turn'] == (len(set(starts)) > 1)


def test_every_topic_happens_and_everything_can():
    clips, topic, _ = made('few', 3000)
    assert set(topic.tolist()) == set(range(len(ABOUT)))
    verbs = {verb for s in stories(clips) for _, _, verb, _ in s['others']}
    assert verbs == {'turns', 'grows', 'shrinks', 'appears', 'vanishes'}
    assert {len(s['moves']) for s in stories(clips)} == {0, 1, 2, 3}


STANDARD = {w: name for name, words in dict(
    moves=('goes', 'travels'), slowly=('at low speed',), quickly=('fast',), left=('to the left',), right=('to the right',), up=('upwards',),
    down=('downwards',), turns=('becomes',), grows=('gets larger',), shrinks=('gets smaller',), appears=('shows up',),
    vanishes=('disappears',)).items() for w in words} | {w: m for w, m in MEANING.items() if w != m}


def standard(text):
    "A paraphrase in standard words and order"
    text = f' {text} '
    for word in sorted(STANDARD, key=len, reverse=True): text = text.replace(f' {word} ', f' {STANDARD[word]} ')
    moves, *others = text.strip().removeprefix('first ').split(' , and ')
    if ' after ' in moves: moves = ' , then '.join(moves.split(' after ')[::-1])
    return ' , and '.join([moves, *others])


@pytest.mark.parametrize('level', LEVELS)
def test_paraphrases_mean_the_same(level):
    clips, _, _ = made(level, 120, skin='mixed')
    ways = bits(clips.code, 299, 12).tolist()
    for story, numbers in zip(stories(clips), ways):
        plain, words = say(story), set(clip_words())
        for way in numbers:
            text = say(story, way)
            assert set(text.split()) <= words
            a, b = standard(text), plain
            if ' while ' in b: a, b = (sorted(t.split(' , and ')[0].split(' while ')) + t.split(' , and ')[1:] for t in (a, b))
            assert a == b, (text, plain)


def test_captions_are_different_and_begin_with_the_standard_one():
    found = ClipCaptionTask('few').texts(range(500))
    assert all(c[0] == s and len(set(c)) == len(c) for s, c in zip(found['caption'], found['captions']))
    assert np.mean([len(c) for c in found['captions']]) > 4
    assert clip_captions(found['clips'][:9]) == found['caption'][:9]
    with pytest.raises(ValueError, match='no style'): clip_captions(found['clips'], 'poem')


def test_labels_are_what_happens():
    verbs = {4: 'appears', 5: 'vanishes', 6: 'turns', 7: 'grows', 8: 'shrinks'}
    for level in LEVELS:
        clips, label = film_action(mix(torch.arange(600)), CLIP_LEVELS[level])
        for i, k in enumerate(label.tolist()):
            events = seen_events(watch_ref(clips, i))
            assert len(events) == (k != 9)
            for _, verb, *detail in events: assert (f'moving {detail[0]}' == CLIP_CLASSES[k]) if verb == 'moves' else verbs[k] == verb
        assert torch.bincount(label, minlength=10).sub(60).abs().max() < 30


# ---- the same bytes for anybody ----

@pytest.mark.parametrize('task', [ClipCaptionTask, ClipQuestionTask, ClipLabelTask])
def test_batches_do_not_matter(task):
    data = task('few', skin='mixed', image_size=24, size=60)
    whole = data.batch(range(60))
    for some in ([5], [59, 3, 3], range(7, 20)):
        part = data.batch(list(some))
        for name, value in part.items():
            if isinstance(value, torch.Tensor): assert torch.equal(value, whole[name][list(some)]), name
            elif isinstance(value, list): assert value == [whole[name][i] for i in some]
    assert torch.equal(data[7]['video'], whole['video'][7]) and set(data.fields) <= set(data[7])
    def digest(workers, size):
        loader = DataLoader(data, size, num_workers=workers, collate_fn=list)
        return hashlib.sha256(b''.join(s['video'].numpy().tobytes() for rows in loader for s in rows)).hexdigest()
    assert digest(0, 7) == digest(2, 25)


def test_splits_seeds_and_tasks_differ():
    base = ClipQuestionTask('pair').batch(range(5))['video']
    for other in (ClipQuestionTask('pair', 'valid'), ClipQuestionTask('pair', seed=1), ClipCaptionTask('pair'), ClipQuestionTask('pair', skin='digits')):
        assert not torch.equal(other.batch(range(5))['video'], base)
    assert type(make_task('clip_question', 'pair')) is ClipQuestionTask and type(make_task('clip_caption')) is ClipCaptionTask


# ---- nobody answers without watching ----

def numbered_answers(found): return [o.index(a) for o, a in zip(found['options'], found['answer'])]


@pytest.mark.parametrize('level', ['one', 'pair', 'crowd'])
def test_text_alone_does_not_tell(level):
    train, test = (ClipQuestionTask(level, split).texts(range(n)) for split, n in (('train', 20_000), ('valid', 12_000)))
    for kind in sorted(set(test['kind'])):
        rows = [[(q, y) for q, y, k in zip(f['question'], numbered_answers(f), f['kind']) if k == kind] for f in (train, test)]
        (qa, ya), (qb, yb) = (zip(*r) for r in rows)
        blind = TextOnly().fit(qa, ya).accuracy(qb, yb)
        noise = 2*(.25/len(yb))**.5                                                         # of so few questions
        assert blind <= max(majority(ya, yb), 1/len(set(yb))) + .02 + noise, (kind, blind)


def states(level, split, n):
    "What every frame shows of the objects, the one asked about first: more than any reader of pixels could know"
    task = ClipQuestionTask(level, split)
    clips, topic, part = task.film(range(n), topics=CLIP_QUESTIONS)
    found = task.texts(range(n))
    named_second = (bits(clips.code, 291) & 1).bool()[:, None] & torch.isin(topic, torch.tensor([4, 5]))[:, None] & (part < 2)
    order = torch.where(named_second, 1 - part, part).argsort(1)
    shown = unfold(clips)
    table = torch.stack([shown.x, shown.y, shown.r, shown.colour.float(), shown.kind.float()], -1)*shown.present[..., None]
    table = table.unflatten(0, (n, 8)).gather(2, order[:, None, :, None].expand(-1, 8, -1, 5)).flatten(2)
    words = torch.tensor([['last' in q, 'up' in q] for q in found['question']]).float()
    return table, words, np.array(numbered_answers(found)), np.array(found['kind'])


@pytest.mark.parametrize('level, kinds', [('one', CLIP_QUESTIONS), ('pair', CLIP_QUESTIONS), ('few', ('direction', 'moves', 'count'))])
def test_one_frame_alone_does_not_tell_but_all_do(level, kinds):
    train, test = states(level, 'train', 12_000), states(level, 'valid', 12_000)
    for kind in sorted(set(test[3]) & set(kinds)):
        def accuracy(frames):
            rows = [(torch.cat([t[:, frames].flatten(1), w], 1)[k == kind].numpy(), y[k == kind]) for t, w, y, k in (train, test)]
            model = HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=15, early_stopping=False, random_state=0).fit(*rows[0])
            return model.score(*rows[1]), len(rows[1][1]), len(set(rows[1][1]))
        for frame in (0, 4, 7):
            right, n, answers = accuracy([frame])
            assert right <= 1/answers + .02 + 2*(.25/n)**.5, (kind, frame, right)           # two points and the test's own noise
        if kind in ('direction', 'before', 'size') or kind in ('speed', 'moves', 'count') and level != 'few':
            right, n, answers = accuracy(list(range(8)))
            assert right > 1/answers + .15, (kind, right)                                   # the same reader, allowed to watch
