"Phrases in words and back are inverse; the search gives every sample scenes of its own, the same in any batch."
import itertools
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.world.dice import mix
from vl_tutor.world.drawing import COLOURS, KINDS, SIZES, TEXTURES
from vl_tutor.world.phrases import (ATTRIBUTES, ROOM, VALUES, article, best, choose, describe, in_places, likeness, looks, masks, matches, phrase_words,
                                    pick, plural, read_phrase, read_template, say, search, take, template_patterns)
from vl_tutor.world.scenes import LEVELS, SKINS, SPLITS, World
from vl_tutor.world.tasks import things

phrases = st.tuples(*(st.sampled_from([i for i in range(-1, len(VALUES[k])) if (k, i) != ('texture', 0)]) for k in ATTRIBUTES))


def meaning(phrase): return {k: VALUES[k][v] for k, v in zip(ATTRIBUTES, phrase) if v >= 0}


# ---- words ----

@settings(max_examples=300, deadline=None)
@given(phrases, st.integers(0, 2**32 - 1), st.booleans())
def test_reading_undoes_saying(phrase, pick, many):
    text = say(phrase, pick, many)
    assert read_phrase(text) == meaning(phrase)
    assert set(text.split()) <= set(phrase_words())
    if not many: assert read_phrase(article(text)) == meaning(phrase) and article(text).split()[0] in ('a', 'an')


def test_every_synonym_is_said_and_no_word_is_missing():
    said = {w for size, texture, colour, kind in itertools.product((-1, 0, 1), (-1, 1, 2), (-1, 0, 5), range(-1, len(KINDS)))
            for way in range(6) for many in (False, True) for w in say((size, texture, colour, kind), way*0x01010101, many).split()}
    assert set(phrase_words()) - said == {'a', 'an', 'plain', 'green', 'blue', 'yellow', 'purple'}


@pytest.mark.parametrize('text', ['', ' ', 'red', 'a', 'the red thing', 'red small box', 'reds', 'small plain box', 'a dog', 'red  thing', 'thing thing', 'Red thing', 'ring s', '\x00'])
def test_no_phrase(text): assert read_phrase(text) is None


def test_plurals_and_articles():
    assert [plural(w) for w in ('box', 'cross', 'plus', 'six', 'star', 'zero')] == ['boxes', 'crosses', 'pluses', 'sixes', 'stars', 'zeros']
    assert [article(w).split()[0] for w in ('orange box', 'object', 'eight', 'one', 'ones', 'tiny box')] == ['an', 'an', 'an', 'a', 'a', 'a']
    assert in_places((-1, -1, 0, 0), (1, -1, -1, -1), (0, 0)) == dict(a='a red circle', p='red circle', q='large thing', ps='red circles', qs='large things')


def test_templates_need_real_phrases():
    patterns = template_patterns((('x', 'the {p} beats {qs} ?'),))
    assert read_template('the tiny disc beats hoops ?', patterns) == dict(name='x', p=dict(size='small', kind='circle'), q=dict(kind='ring'))
    for text in ('the dog beats hoops ?', 'the tiny disc beats hoops', 'the tiny disc beats hoops x', 'the tiny disc beats hoops ? ?'): assert read_template(text, patterns) is None


# ---- tensors against one thing after another ----

@pytest.mark.parametrize('level,skin,split', [(level, 'mixed', split) for level in LEVELS for split in SPLITS])
def test_matches_are_what_words_mean(level, skin, split):
    world, numbers = World(level, split, skin=skin), torch.arange(200).view(50, 4)
    look, present = looks(world, numbers)
    p = describe(take(look[:, 0], pick(mix(numbers[:, 0]), 1, present[:, 0])[:, 0]), choose(mix(numbers[:, 0]), 2, masks('c', 'k', 'ck', 'sc', 'tk', 'stck')))
    n, near = matches(look, present, p).sum(2), likeness(look, present, p)
    told = things(world.scenes(numbers.flatten()))
    for row, (b, k) in enumerate(itertools.product(range(50), range(4))):
        said = read_phrase(say(p[b].tolist()))
        assert n[b, k] == sum(all(t[a] == v for a, v in said.items()) for t in told[row])
        assert near[b, k] == sum(any(t[a] == v for t in told[row]) for a, v in said.items())


@pytest.mark.parametrize('level,skin', [*itertools.product(LEVELS, SKINS)])
def test_looks_are_those_of_the_world(level, skin):
    world = World(level, 'long', skin=skin)
    look, present = looks(world, torch.arange(60).view(20, 3))
    scenes = world.scenes(range(60))
    assert present.flatten(0, 1).equal(scenes.present)
    for i, name in enumerate(ATTRIBUTES): assert look[..., i].flatten(0, 1).equal(getattr(scenes, name))


def test_pick_takes_different_things_that_are_there():
    present = torch.arange(6) < torch.arange(2, 7).repeat(200)[:, None]
    two = pick(mix(torch.arange(1000)), 1, present, 2)
    assert (two[:, 0] != two[:, 1]).all() and (two < present.sum(1, keepdim=True)).all()
    share = two[4::5, 0].bincount(minlength=6)/200                      # six things: each as often as another
    assert (share - 1/6).abs().max() < .1


def test_best_by_hand():
    found = torch.tensor([[False, True, True], [False, False, False], [True, True, True]])
    assert best(found, torch.tensor([[9, 1, 2], [9, 9, 9], [0, 0, 0]])).tolist() == [2, 0, 0]


# ---- search ----

def ask(code, numbers): return dict(ok=mix(numbers[:, 0])[:] % 3 == 0, number=numbers[:, 0], code=code)


def test_search_does_not_depend_on_company():
    index = torch.arange(100)
    whole = search(ask, mix(index), index, 4)
    for rows in (index.flip(0), index[::7], index[5:6]):
        part = search(ask, mix(index[rows]), index[rows], 4)
        assert all(part[k].equal(whole[k][rows]) for k in whole)
    assert (whole['number']//ROOM == index).all() and (mix(whole['number']) % 3 == 0).all()


def test_search_tells_when_it_gives_up():
    with pytest.raises(ValueError, match='3 samples .* found nothing in 4096'): search(lambda code, n: dict(ok=n[:, 0] < 0), mix(torch.arange(3)), torch.arange(3), 64)
