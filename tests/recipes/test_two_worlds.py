"The two worlds: scenes by number, apart and in the picture, told truly; swapped colours and hidden words."
import pytest
import torch
from vl_tutor.recipes.two_worlds import (KINDS, SIDE, choose_scenes, claim_tokenizer, draw_scenes, mask_some, pages, quadrants, swap_colours, tell,
                                         word_ids, words_among)
from vl_tutor.world.dice import mix
from vl_tutor.world.drawing import COLOURS, INK


@pytest.mark.parametrize('world', ['free', 'grid'])
def test_a_scene_depends_on_its_number_alone(world):
    few, many = choose_scenes(world, 'test', 5), choose_scenes(world, 'test', 50)
    assert all(torch.equal(few[k], many[k][:5]) for k in few)
    assert not torch.equal(choose_scenes(world, 'train', 5)['colour'], few['colour'])
    single = choose_scenes(world, 'test', 5, things=1)
    assert single['kind'].shape == (5, 1) and torch.equal(single['kind'][:, 0], few['kind'][:, 0])


def test_an_unknown_world_is_refused():
    with pytest.raises(ValueError, match="'free' and 'grid', not 'flat'"): choose_scenes('flat', 'test', 1)


@pytest.mark.parametrize('world', ['free', 'grid'])
def test_two_objects_differ_and_stay_apart_inside_the_picture(world):
    s = choose_scenes(world, 'test', 500)
    assert (s['kind'][:, 0] != s['kind'][:, 1]).all() and (s['colour'][:, 0] != s['colour'][:, 1]).all()
    reach = s['r'][..., None]
    assert (s['spot'] - reach >= 0).all() and (s['spot'] + reach <= SIDE).all()
    gap = (s['spot'][:, 0] - s['spot'][:, 1]).abs().amax(1)
    assert (gap >= s['r'].sum(1)).all()


def test_quarters_are_neighbours_and_all_of_them_occur():
    spot = quadrants(mix(torch.arange(400)))
    step = (spot[:, 0] - spot[:, 1]).abs()
    assert set(step.sum(1).tolist()) == {16.}
    assert len({tuple(p) for p in spot.flatten(1).tolist()}) == 8


@pytest.mark.parametrize('world', ['free', 'grid'])
def test_a_picture_shows_the_colours_and_a_caption_tells_the_truth(world):
    s = choose_scenes(world, 'test', 60)
    image, (texts, first) = draw_scenes(s), tell(s)
    for i, text in enumerate(texts):
        a, b = (s['spot'][i, w] for w in (first[i], 1 - first[i]))
        words = text.split()
        assert words[1:3] == [COLOURS[s['colour'][i, first[i]]], KINDS[s['kind'][i, first[i]]]]
        dx, dy = (b - a).tolist()
        assert words[3] == (('left' if dx > 0 else 'right') if abs(dx) > abs(dy) else 'above' if dy > 0 else 'below')
        for o in range(2):
            x, y = s['spot'][i, o].long().tolist()
            want = (INK[s['colour'][i, o]]*s['shade'][i, o]).clamp(0, 1)*255
            assert (image[i, :, y, x].float() - want).abs().max() <= 1


def test_swapping_exchanges_the_two_colours_and_nothing_else():
    tokenizer = claim_tokenizer()
    ids, _ = tokenizer.encode(['a red circle left of a blue square', 'a green square above a red circle'])
    swapped = swap_colours(ids, word_ids(COLOURS))
    assert tokenizer.decode(swapped) == ['a blue circle left of a red square', 'a red square above a green circle']
    assert torch.equal(swap_colours(swapped, word_ids(COLOURS)), ids)


def test_every_text_has_a_hidden_word_and_no_marker_is_hidden():
    data = pages('grid', 'train', 200)
    torch.manual_seed(0)
    masked, labels = mask_some(data.ids, data.words)
    asked = labels != -100
    assert asked.any(1).all() and not (asked & ~data.words).any()
    assert (masked[asked] == claim_tokenizer().mask_id).all() and torch.equal(masked[~asked], data.ids[~asked])
    assert .25 < asked.sum()/data.words.sum() < .36


def test_words_among_finds_the_first_or_all():
    data = pages('grid', 'test', 20)
    every, one = (words_among(data, COLOURS, first=first) for first in (False, True))
    assert (every.sum(1) == 2).all() and (one.sum(1) == 1).all() and not (one & ~every).any()
    assert set(data.ids[every].tolist()) <= set(word_ids(COLOURS).tolist())
