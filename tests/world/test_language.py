"Captions and their reading are inverse; scores say what is right; text never leaks what pictures hold out."
import itertools
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.world.drawing import COLOURS, KINDS, SIZES, TEXTURES, compose
from vl_tutor.world.language import (SYNONYMS, all_captions, attribute_accuracy, canonical, caption, captions, paraphrases, parse, structure,
                                     text_stream, world_tokenizer, world_words)
from vl_tutor.world.scenes import HELD_OUT, LEVELS, SKINS, SPLITS, World

things = st.fixed_dictionaries(dict(size=st.sampled_from(SIZES), texture=st.sampled_from(TEXTURES), colour=st.sampled_from(COLOURS), kind=st.sampled_from(KINDS)))
pairs = st.builds(lambda a, b, r: dict(objects=[a, b], relation=r), things, things, st.sampled_from(['left of', 'above']))
lists = st.builds(lambda o: dict(objects=o, relation=None), st.one_of(st.lists(things, min_size=1, max_size=1), st.lists(things, min_size=3, max_size=6)))


@settings(max_examples=150, deadline=None)
@given(st.one_of(pairs, lists))
def test_reading_undoes_saying(truth):
    ways = all_captions(truth)
    assert len(set(ways)) == len(ways) and ways[0] == canonical(truth)
    for text in ways[::max(1, len(ways)//50)]:
        assert parse(text) == truth
        assert parse(text.upper().replace(' , ', ',')) == truth


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(world_words()), max_size=16).map(' '.join))
def test_what_is_read_can_be_said(text):
    "Random words of the grammar are nearly always None; if not, the structure's own captions hold the text"
    truth = parse(text)
    if truth is not None: assert parse(canonical(truth)) == truth


@pytest.mark.parametrize('text', ['', ' ', 'a', 'and', ',', 'a red square', 'small red square', 'a small red dog', 'a small red square and a big blue disc',
    'a small red square left of', 'left of a small red square', 'a small red square left of a small red square left of a small red square',
    'a small plain red square', 'there is', 'a small red square.', '(', 'a small red square left a large blue circle', '\x00'])
def test_outside_the_grammar(text): assert parse(text) is None


def test_every_true_caption_of_a_pair_is_there():
    "Counted independently: words for size and kind of both objects, times seven ways to relate them"
    for truth in structure(World('pair', skin='mixed').scenes(range(100))):
        n = 1
        for o in truth['objects']: n *= len(SYNONYMS.get(o['size'])) * len(SYNONYMS.get(o['kind'], 'x'))
        assert len(set(all_captions(truth))) == 7*n


def test_false_captions_are_not_among_the_true():
    scenes = World('pair').scenes(range(100))
    for i, truth in enumerate(structure(scenes)):
        true = set(paraphrases(scenes, i))
        swapped = dict(objects=truth['objects'][::-1], relation=truth['relation'])
        other = dict(objects=truth['objects'], relation='above' if truth['relation'] == 'left of' else 'left of')
        assert not true & set(all_captions(swapped)) and not true & set(all_captions(other))


@pytest.mark.parametrize('level', LEVELS)
def test_canonical_order(level):
    s = World(level, skin='mixed').scenes(range(300))
    for i, truth in enumerate(structure(s)):
        n = s.present[i]
        x, y = s.x[i][n], s.y[i][n]
        down = len(x) == 2 and (y[0] - y[1]).abs() > (x[0] - x[1]).abs()
        order = (y if down else x).argsort()
        assert [o['kind'] for o in truth['objects']] == [KINDS[k] for k in s.kind[i][n][order]]
        assert truth['relation'] == (None if len(x) != 2 else 'above' if down else 'left of')


def test_the_promised_sentences():
    things = [dict(kind='circle', colour='blue', x=34, y=20, r=10), dict(kind='square', colour='red', x=10, y=25, r=6)]
    assert caption(compose(things)) == 'a small red square left of a large blue circle'
    assert caption(compose([dict(t, x=t['y'], y=t['x']) for t in things])) == 'a small red square above a large blue circle'
    assert caption(compose(things[1:])) == 'a small red square'
    three = [dict(things[1], x=8), dict(things[0], x=22, r=9, texture='striped'), dict(kind='ring', colour='green', x=40, y=9, r=5)]
    assert caption(compose(three)) == 'a small red square , a large striped blue circle and a small green ring'
    assert caption(compose([dict(kind='seven', colour='red', x=9, y=9, r=6), dict(kind='three', colour='blue', x=33, y=9, r=9)])) == \
        'a small red seven left of a large blue three'


# ---- scores ----

@pytest.mark.parametrize('level', LEVELS)
def test_right_answers_score_one(level):
    s = World(level, skin='mixed').scenes(range(100))
    assert set(attribute_accuracy(captions(s), s).values()) == {1.}
    said = attribute_accuracy(captions(s, 'paraphrase'), s)
    assert said['true'] == 1 and said['kind'] == 1 and said['exact'] < 1


def test_wrong_answers_by_hand():
    s = compose([dict(kind='circle', colour='blue', x=34, y=20, r=10), dict(kind='square', colour='red', x=10, y=25, r=6)])
    score = lambda text: tuple(attribute_accuracy([text], s).values())                    # kind colour size relation exact true
    assert score('a small red square above a large blue circle') == (1, 1, 1, 0, 0, 0)
    assert score('a large blue circle left of a small red square') == (0, 0, 0, 1, 0, 0)
    assert score('a small red square') == (.5, .5, .5, 0, 0, 0)
    assert score('a small green square left of a large blue ring') == (.5, .5, 1, 1, 0, 0)
    assert score('nonsense') == score('') == (0, 0, 0, 0, 0, 0)
    assert score('there is a big blue disc right of a tiny red box') == (1, 1, 1, 1, 0, 1)


def test_answers_of_other_pictures_are_at_chance():
    s = World('pair', 'test').scenes(range(1500))
    said = attribute_accuracy(captions(s)[1:] + captions(s)[:1], s)
    for name, chance in dict(kind=1/6, colour=1/6, size=1/2, relation=1/2).items(): assert abs(said[name] - chance) < .04
    assert said['exact'] < .01


def test_mistakes():
    s = World('pair').scenes(range(3))
    with pytest.raises(ValueError, match='2 predictions for 3'): attribute_accuracy(['a', 'b'], s)
    with pytest.raises(ValueError, match='poem'): captions(s, 'poem')
    with pytest.raises(ValueError, match='share'): text_stream(World(), 3, canonical=2)


# ---- words ----

def test_no_unknown_word():
    tokenizer = world_tokenizer()
    for level, skin, split in itertools.product(LEVELS, SKINS, SPLITS):
        texts = captions(World(level, split, skin=skin).scenes(range(60)), 'paraphrase')
        ids, mask = tokenizer.encode(texts)
        assert tokenizer.decode(ids) == texts                       # an unknown word would not come back
        assert mask.any(1).all()
    assert len(world_words()) == len(set(world_words())) and world_words() == sorted(world_words())


def test_paraphrases_use_every_word():
    said = set()
    for level, skin in itertools.product(LEVELS, SKINS):
        for text in captions(World(level, skin=skin).scenes(range(1500)), 'paraphrase'): said |= set(text.split())
    assert said == set(world_words())


def test_picked_paraphrase_belongs_to_the_scene():
    s = World('pair').scenes(range(40))
    together = captions(s, 'paraphrase')
    assert [captions(s[i:i+1], 'paraphrase')[0] for i in range(40)] == together
    assert captions(s, 'paraphrase', indices=[3, 1]) == [together[3], together[1]]


# ---- text for language models ----

@pytest.mark.parametrize('skin', SKINS)
def test_stream_never_speaks_of_held_out_combinations(skin):
    for text in text_stream(World('pair', skin=skin), 4000, canonical=.5):
        for o in parse(text)['objects']: assert HELD_OUT[KINDS.index(o['kind'])] != COLOURS.index(o['colour'])


def test_stream_repeats_one_to_three_times():
    stream = text_stream(World('pair'), 6000)
    runs = torch.tensor([len(list(same)) for _, same in itertools.groupby(stream)][:-1])
    share = runs.bincount(minlength=4)[1:4]/len(runs)
    assert (share - 1/3).abs().max() < .04 and (runs > 3).float().mean() < .01        # equal neighbours seldom meet
    assert {len(list(same)) for _, same in itertools.groupby(text_stream(World('pair'), 200, repeats=1))} <= {1, 2}


def test_stream_is_fixed_and_has_a_prefix():
    assert text_stream(World('pair'), 500)[:100] == text_stream(World('pair'), 100)
    assert text_stream(World('pair'), 100, 1) != text_stream(World('pair'), 100)
    assert [len(text_stream(World('pair'), n)) for n in (0, 1, 2, 7)] == [0, 1, 2, 7]


def test_share_of_canonical_captions():
    share = sum(text == canonical(parse(text)) for text in text_stream(World('pair'), 3000, canonical=.25))/3000
    assert .2 < share < .32                                         # paraphrases are canonical now and then
