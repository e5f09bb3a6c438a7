"Scores of maps: words and objects, boxes and patches, pointing, overlap, covering, shuffling, ranks."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import spearmanr
from vl_tutor.explain.one_call import explain
from vl_tutor.explain.scoring import (area_under, centre_map, chances_ref, coverage, covered, deletion, insertion, joint_chances,
                                      map_iou, owned_patches, pointing_game, random_map, randomised, rank_correlation, ranks,
                                      told_boxes, word_chances, word_objects)
from vl_tutor.recipes.captioner import load_captioner
from vl_tutor.recipes.vlc import load_vlc
from vl_tutor.world.language import MEANING, all_captions, captions, structure
from vl_tutor.world.scenes import World

whole = st.integers(0, 48)
box = st.tuples(whole, whole, whole, whole).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
full_box = box.filter(lambda b: b[2] > b[0] and b[3] > b[1])
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def captioner(): return load_captioner()


@pytest.fixture(scope='module')
def vlc(): return load_vlc()


@pytest.fixture(scope='module')
def scene():
    world = World('pair', 'test')
    scenes = world.scenes([3])
    return world.draw(scenes)[0], captions(scenes)[0], told_boxes(scenes)[0]


def test_every_template_gives_each_object_its_own_words():
    for truth in structure(World('pair', 'test', skin='mixed').scenes(range(60))):
        for said in all_captions(truth)[::7]:
            words = said.split()
            named = [{MEANING.get(w, w) for w, k in zip(words, word_objects(words)) if k == o} for o in (0, 1)]
            assert named == [{t['size'], t['colour'], t['kind']} for t in truth['objects']], said


def test_boxes_come_in_the_order_of_the_caption():
    scenes = World('pair', 'valid').scenes(range(100))
    for pair, truth in zip(told_boxes(scenes).tolist(), structure(scenes)):
        middle = [((b[0] + b[2])/2, (b[1] + b[3])/2) for b in pair]
        axis = 0 if truth['relation'] == 'left of' else 1
        assert middle[0][axis] < middle[1][axis]


@given(box)
@settings(max_examples=60, deadline=None)
def test_coverage_counts_pixels(corners):
    left, top, right, low = corners
    mask = torch.zeros(48, 48)
    mask[top:low, left:right] = 1
    want = mask.unflatten(0, (6, 8)).unflatten(2, (6, 8)).mean((1, 3))
    assert torch.allclose(coverage(torch.tensor(corners), (6, 6)), want, atol=1e-6)


@given(full_box)
@settings(max_examples=60, deadline=None)
def test_every_box_owns_a_patch_and_its_own_map_hits_it(corners):
    corners = torch.tensor(corners)
    owned = owned_patches(corners, (6, 6))
    assert owned.any() and (owned.sum() == 1 or (coverage(corners, (6, 6))[owned] >= .5 - 1e-6).all() or
                            coverage(corners, (6, 6)).max() < .5)
    assert pointing_game(coverage(corners, (6, 6)), corners) == 1
    assert pointing_game(1 - owned.float(), corners) == (0 if not owned.all() else 1)


def test_a_constant_map_scores_chance():
    boxes = told_boxes(World('pair', 'test').scenes(range(50))).flatten(0, 1)
    chance = owned_patches(boxes, (6, 6)).float().mean((1, 2))
    assert torch.allclose(pointing_game(torch.zeros(100, 6, 6), boxes), chance)
    assert pointing_game(centre_map(100, (6, 6)), boxes).mean() < .3
    assert random_map(2, (3, 4), 1).shape == (2, 3, 4) and not torch.equal(random_map(2, (3, 4), 1), random_map(2, (3, 4), 2))


@given(full_box, st.integers(0, 99), st.integers(-9, 9).map(lambda k: 2.**k))
@settings(max_examples=60, deadline=None)
def test_overlap_lies_between_0_and_1_and_ignores_scale(corners, seed, scale):
    m, corners = random_map(1, (6, 6), seed)[0], torch.tensor(corners)
    iou = map_iou(m, corners)
    assert 0 <= iou <= 1 and torch.allclose(iou, map_iou(m*scale, corners), atol=1e-5)
    kept = [(r, c) for r in range(6) for c in range(6) if m[r, c] >= .5*m.max()]
    share = coverage(corners, (6, 6))
    both = sum(share[r, c].item() for r, c in kept)
    assert iou.item() == pytest.approx(both/(len(kept) + share.sum().item() - both), abs=1e-5)


@pytest.mark.parametrize('insert', [False, True])
def test_covering_goes_from_the_highest_patch_to_the_lowest(insert):
    dice = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, 12, 12), generator=dice, dtype=torch.uint8)
    maps = torch.rand(2, 3, 4, generator=dice)
    found, wall = covered(picture, maps, steps=4, insert=insert), picture.flatten(1).median(1).values
    for map_, row in zip(maps, found):
        order = map_.flatten().argsort(descending=True).tolist()
        for step, shown in enumerate(row):
            want = picture.clone() if not insert else wall[:, None, None].expand_as(picture).clone()
            for p in order[:3*step]:
                r, c = divmod(p, 4)
                where = (slice(None), slice(4*r, 4*r + 4), slice(3*c, 3*c + 3))
                want[where] = picture[where] if insert else wall[:, None, None]
            assert torch.equal(shown, want)


def test_patches_must_divide_the_picture():
    with pytest.raises(ValueError, match='5×6 patches do not divide 48 pixels'):
        covered(torch.zeros(3, 48, 48, dtype=torch.uint8), torch.rand(1, 5, 6))
    with pytest.raises(ValueError, match='a box has 4 numbers, not 2'): coverage(torch.zeros(2), (2, 2))


def test_one_batch_says_what_single_cases_say(captioner, vlc, scene):
    picture, text, _ = scene
    pictures, labels = covered(picture, random_map(1, (6, 6)), steps=3)[0], torch.tensor([1, 3, 3, 8])
    assert torch.allclose(word_chances(captioner, text)(pictures, labels), chances_ref(captioner, text)(pictures, labels), atol=1e-5)
    assert torch.allclose(joint_chances(vlc, text, 'words')(pictures, labels),
                          chances_ref(vlc, text, 'words')(pictures, labels), atol=1e-5)


def test_whole_text_chances_are_the_models_own(vlc, scene):
    picture, text, _ = scene
    ids, mask = vlc.texts([text])
    image, zero = vlc.images([picture]), torch.tensor([0])
    with torch.no_grad():
        assert joint_chances(vlc, text, 'match')(picture[None], zero) == vlc.model.match(image, ids, mask).softmax(-1)[:, 1]
        assert joint_chances(vlc, text, 'rank')(picture[None], zero) == vlc.model.rank(image, ids, mask).sigmoid()
    answer = vlc.answer([picture], ['is there a star ?'])[0]
    assert joint_chances(vlc, 'is there a star ?', answer.text)(picture[None], zero).item() == pytest.approx(answer.probability, abs=1e-5)


def test_the_truth_matters_more_than_noise(vlc):
    world = World('pair', 'valid')
    scenes, falls = world.scenes(range(6)), []
    for picture, text, boxes in zip(world.draw(scenes), captions(scenes), told_boxes(scenes)):
        rows = torch.tensor([i for i, k in enumerate(word_objects(text.split())) if k >= 0])
        truth = coverage(boxes[[word_objects(text.split())[i] for i in rows]], (6, 6))
        chance = joint_chances(vlc, text, 'words')
        falls.append([[area_under(f(chance, picture, m, rows)).mean() for m in (truth, random_map(len(rows), (6, 6)))]
                      for f in (deletion, insertion)])
    (down, noise_down), (up, noise_up) = torch.tensor(falls).mean(0).tolist()
    assert down < noise_down - .1 and up > noise_up + .05


def test_curves_begin_and_end_with_the_same_pictures(captioner, scene):
    picture, text, _ = scene
    chance, rows = word_chances(captioner, text), torch.tensor([2, 3])
    down, up = (f(chance, picture, random_map(2, (6, 6)), rows, steps=2) for f in (deletion, insertion))
    assert down.shape == (2, 3)
    assert torch.allclose(down[:, 0], up[:, -1]) and torch.allclose(down[:, -1], up[:, 0])
    assert area_under(torch.tensor([1., 1, 0])) == .75


def test_shuffling_keeps_the_numbers_and_the_tool(captioner):
    before = {k: v.clone() for k, v in captioner.model.state_dict().items()}
    lost, again, third = (randomised(captioner, s) for s in (0, 0, 1))
    for (name, p), q, r in zip(lost.model.named_parameters(), again.model.parameters(), third.model.parameters()):
        assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values) and torch.equal(p, q)
        if len(p.flatten().unique()) > 8: assert not torch.equal(p, before[name]) and not torch.equal(p, r), name
    assert all(torch.equal(v, before[k]) for k, v in captioner.model.state_dict().items())
    assert lost.tokenizer is captioner.tokenizer


def test_shuffled_weights_forget(vlc, scene):
    picture, text, _ = scene
    assert explain(vlc, picture, text).scores.exp().mean() > .5 > .2 > explain(randomised(vlc), picture, text).scores.exp().mean()


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.lists(st.integers(0, 5), min_size=6, max_size=6))
@settings(max_examples=80, deadline=None)
def test_rank_correlation_is_spearmans(a, b):
    a, b = torch.tensor(a).float().view(2, 3), torch.tensor(b).float().view(2, 3)
    got = rank_correlation(a, b).item()
    if len(a.unique()) == 1 or len(b.unique()) == 1: assert got == 0
    else: assert got == pytest.approx(spearmanr(a.flatten(), b.flatten()).statistic, abs=1e-5)
    assert ranks(a.flatten()).sum() == 15


def test_maps_of_different_shape_do_not_compare():
    with pytest.raises(ValueError, match='do not compare'): rank_correlation(torch.rand(2, 2), torch.rand(2, 3))
