"Every expression means one thing, whoever reads it; every heap of boxes holds it once; nothing is said in vain."
from collections import Counter
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.ops import box_iou
from vl_tutor.data.boxes import iou
from vl_tutor.world.dice import mix
from vl_tutor.world.drawing import COLOURS, KINDS, SIZES, TEXTURES, compose, object_boxes
from vl_tutor.world.referring import (ATTRIBUTES, ENDS, FAMILIES, MASKS, NOUNS, PART, RELATIONS, ReferringTask, draft, draw_one, express, minimal,
                                      noun_phrase, proposals, read_expression, refer_ref, who_fits)
from vl_tutor.world.scenes import LEVELS, SKINS, SPLITS, World
from vl_tutor.world.tasks import things

everywhere = [(level, skin, split) for level in LEVELS for skin in SKINS for split in SPLITS]


def parts(expression):
    asked = read_expression(expression)
    return asked['what'], asked['mark'], asked['end'], asked['side']


# ---- one referent ----

@pytest.mark.parametrize('level,skin,split', everywhere)
def test_one_referent(level, skin, split):
    "Read back by the slow twin, in the generous and in the strict reading"
    said = ReferringTask(level, split, skin=skin).texts(range(120))
    for text, found, box in zip(said['expression'], things(said['scenes']), said['box'].tolist()):
        for strict in (False, True): assert [found[i]['box'] for i in refer_ref(text, found, strict)] == [box], text


@pytest.mark.parametrize('level', ['pair', 'few', 'crowd'])
def test_clear_leads(level):
    "The first from one end leads by three pixels, or by 15 % of half side and of box"
    said = ReferringTask(level, 'long', skin='mixed').texts(range(500))
    for text, found, box in zip(said['expression'], things(said['scenes']), said['box'].tolist()):
        what, _, end, _ = parts(text)
        if end is None: continue
        me = next(o for o in found if o['box'] == box)
        rivals = [o for o in found if o is not me and all(o[k] == v for k, v in what.items())]
        assert rivals, f'{text}: nobody else is meant by it anyway'
        area = lambda o: (o['box'][2] - o['box'][0])*(o['box'][3] - o['box'][1])
        for o in rivals:
            if end in ('largest', 'smallest'):
                small, big = (me, o) if end == 'smallest' else (o, me)
                assert big['r'] > 1.149*small['r'] and area(big) > 1.149*area(small)
            else: assert dict(leftmost=o['x'] - me['x'], rightmost=me['x'] - o['x'], topmost=o['y'] - me['y'], lowest=me['y'] - o['y'])[end] > 2.99
        assert not (end in ('largest', 'smallest') and 'size' in what)


@pytest.mark.parametrize('level,skin', [('pair', 'mixed'), ('few', 'shapes'), ('crowd', 'mixed')])
def test_nothing_is_said_in_vain(level, skin):
    "Attributes: no part is enough. Ends and relations: the phrase alone is not"
    said = ReferringTask(level, skin=skin).texts(range(500))
    for text, found, family in zip(said['expression'], things(said['scenes']), said['family']):
        what, mark, end, side = parts(text)
        fitting = lambda names, what: sum(all(o[k] == what[k] for k in names) for o in found)
        assert family == ('superlative' if end else 'relation' if side is not None else 'attributes')
        if family != 'attributes': assert fitting(what, what) > 1
        for named in [what]*(family == 'attributes') + [mark]*(family == 'relation'):
            assert named and fitting(named, named) == 1 and all(fitting(set(named) - {k}, named) != 1 for k in named)
        if 'texture' in {**what, **mark}: assert any(o['texture'] != 'plain' for o in found)


def test_families_attributes_and_words_all_occur():
    said = ReferringTask('crowd', skin='mixed').texts(range(3000))
    share = Counter(said['family'])
    assert set(share) == set(FAMILIES) and min(share.values()) > .3*3000
    asked = [parts(t) for t in said['expression']]
    for k, values in dict(size=SIZES, texture=TEXTURES, colour=COLOURS, kind=KINDS).items():
        assert {a.get(k) or b.get(k) for a, b, *_ in asked} >= set(values), k
    assert {e for *_, e, _ in asked} == {*ENDS, None} and {s for *_, s in asked} == {*range(4), None}
    heard = {w for t in said['expression'] for w in t.split()}
    assert heard == set(ReferringTask.vocabulary()) - {'and', ',', 'a', 'on', 'at', 'is', 'there', 'top', 'bottom'}


def test_targets_are_anywhere():
    "Who is meant does not depend on its place in the list, nor the true box on its place in the heap"
    said = ReferringTask('crowd').texts(range(4000))
    order = [next(i for i, o in enumerate(found) if o['box'] == box) for found, box in zip(things(said['scenes']), said['box'].tolist())]
    assert min(Counter(order)[i] for i in range(5)) > .15*4000
    assert said['target'].bincount(minlength=16).min() > .7*4000/16


# ---- saying and reading ----

phrases = st.fixed_dictionaries(dict(size=st.sampled_from(SIZES), texture=st.sampled_from(TEXTURES), colour=st.sampled_from(COLOURS), kind=st.sampled_from(KINDS)))


@settings(max_examples=300, deadline=None)
@given(phrases, phrases, st.sampled_from(list(FAMILIES)), st.integers(0, 15), st.integers(1, 15), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**62))
def test_reading_undoes_saying(a, b, family, said, mark_said, end, side, way):
    text = express([a, b], family, way, 0, said, end, 1, side, mark_said)
    asked, keep = read_expression(text), lambda thing, m: {k: thing[k] for k, on in zip(ATTRIBUTES, MASKS[m].tolist()) if on}
    assert asked['what'] == keep(a, said) and set(text.split()) <= set(ReferringTask.vocabulary())
    assert asked['end'] == (list(ENDS)[end] if family == 'superlative' else None)
    assert (asked['side'], asked['mark']) == ((side, keep(b, mark_said)) if family == 'relation' else (None, {}))
    assert read_expression(text.upper().replace(' ', '  ')) == asked


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ReferringTask.vocabulary()), max_size=8).map(' '.join))
def test_anything_else_is_refused_or_means_something(text):
    asked = read_expression('the ' + text)
    if asked: assert set(asked['what']) <= set(ATTRIBUTES) and (asked['side'] is None) == (not asked['mark'] and ' the ' not in f' {text} ')
    else: assert refer_ref('the ' + text, []) == []


@pytest.mark.parametrize('text', ['', 'the', 'red box', 'a red box', 'the red', 'the dog', 'the box red', 'the leftmost box left of the star', 'the box left of the',
                                  'the box left of a star', 'the plain', 'the box left of the star left of the ring', '\x00', '(', 'the leftmost leftmost box'])
def test_outside_the_grammar(text): assert read_expression(text) is None


def test_an_ambiguous_landmark_means_nothing():
    found = things(compose([dict(kind='ring', colour='red', x=8, y=8, r=5), dict(kind='star', colour='red', x=24, y=8, r=5), dict(kind='star', colour='blue', x=40, y=8, r=5)]))[0]
    assert refer_ref('the ring left of the star', found) == [] and refer_ref('the ring left of the blue star', found) == [0]
    assert refer_ref('the thing left of the blue star', found) == [0, 1]


# ---- pieces against slow twins ----

@pytest.mark.parametrize('level', LEVELS)
def test_minimal_by_trying(level):
    s = World(level, skin='mixed').scenes(range(40))
    fit, small = who_fits(s), minimal(who_fits(s))
    for i, found in enumerate(things(s)):
        for o, thing in enumerate(found):
            alone = []
            for m, mask in enumerate(MASKS.tolist()):
                same = [all(other[k] == thing[k] for k, on in zip(ATTRIBUTES, mask) if on) for other in found]
                assert fit[i, o, m, :len(found)].tolist() == same and not fit[i, o, m, len(found):].any()
                if sum(same) == 1: alone.append(m)
            assert small[i, o].nonzero()[:, 0].tolist() == [m for m in alone if not any(k != m and k & m == k for k in alone)]


def test_parts(): assert all(PART[m, k] == (set(b) < set(a)) for m, a in enumerate(map(names, range(16))) for k, b in enumerate(map(names, range(16))))
def names(m): return [k for k, on in zip(ATTRIBUTES, MASKS[m].tolist()) if on]


def test_draw_one_is_fair_and_valid():
    valid = torch.tensor([[False, True, False, True, True]]*6000)
    got = draw_one(valid, mix(torch.arange(6000)) >> 33 & 0xffff).bincount(minlength=5)
    assert got[[0, 2]].sum() == 0 and got[[1, 3, 4]].min() > 1800


@pytest.mark.parametrize('tries', [1, 5])
def test_the_search_does_not_depend_on_its_width(tries):
    code, index = mix(torch.arange(150)), torch.arange(150)
    a, b = draft(World('crowd'), code, index), draft(World('crowd'), code, index, tries)
    assert all(a[k].equal(b[k]) for k in a)


# ---- boxes ----

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40))
def test_iou_equals_torchvisions(seed):
    boxes = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values.flatten(1)*48
    ours = iou(boxes[:, None], boxes)
    assert torch.allclose(ours, box_iou(boxes, boxes), atol=1e-5) and ours.min() >= 0 and ours.max() <= 1 + 1e-6 and ours.equal(ours.T)


@pytest.mark.parametrize('level,skin,split', everywhere)
def test_proposals(level, skin, split):
    said = ReferringTask(level, split, skin=skin).texts(range(80))
    heap, s = said['proposals'], said['scenes']
    assert heap.shape == (80, 16, 4) and heap.min() >= 0 and heap.max() <= 48 and (heap[..., 2:] - heap[..., :2]).min() > 1
    assert heap[torch.arange(80), said['target']].equal(said['box'])
    assert ((iou(heap, said['box'][:, None]) >= .5).sum(1) == 1).all()                          # nothing else would pass for right
    boxes = object_boxes(s)
    same = (boxes[:, :, None] == heap[:, None]).all(-1).sum(2)                                   # every thing is offered
    assert (same[s.present] == 1).all() and len(torch.unique(heap.flatten(0, 1), dim=0)) == 80*16


@pytest.mark.parametrize('n', [10, 40])
def test_number_of_proposals(n):
    said = ReferringTask('crowd', 'long', boxes=n).texts(range(60))
    assert said['proposals'].shape == (60, n, 4) and ((iou(said['proposals'], said['box'][:, None]) >= .5).sum(1) == 1).all()


def test_distractors_are_hard_and_easy():
    "Some overlap the true box, some are larger than it, some smaller, some far away"
    said = ReferringTask('few').texts(range(800))
    near = iou(said['proposals'], said['box'][:, None])
    false = torch.arange(16) != said['target'][:, None]
    area = (said['proposals'][..., 2:] - said['proposals'][..., :2]).prod(-1)
    own = area.gather(1, said['target'][:, None])
    for share in ((near > .2), (near == 0), (area > own), (area < own)): assert share[false].float().mean() > .08
    assert near[false].max() < .5


def test_boxes_grow_with_the_picture():
    small, large = (ReferringTask('few', image_size=s).texts(range(60)) for s in (48, 120))
    assert small['expression'] == large['expression'] and torch.allclose(large['box'], 2.5*small['box']) and torch.allclose(large['proposals'], 2.5*small['proposals'])


def test_too_few_proposals():
    with pytest.raises(ValueError, match='10 or more'): ReferringTask(boxes=9)


def test_nouns(): assert noun_phrase(dict(size='small', texture='plain', colour='red', kind='box'), 4, 0) == f'red {NOUNS[0]}' and len(RELATIONS) == 4
