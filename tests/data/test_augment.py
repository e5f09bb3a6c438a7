"Operations against other implementations of the same thing, their repaired twins, and dice that are nobody else's."
import random
import numpy as np
import pytest
import torch
from PIL import Image
from vl_tutor.data.augment import (OPERATIONS, SIMLA_OPERATIONS, each_colour, equal_table, imagenet_train, inverted, mixed, operate, rand_augment,
                                   seeded, sharpened, simla_augment, simla_strength, strength, stretch_table, turned, warped)

pixels = np.random.default_rng(0).integers(20, 230, (24, 28, 3), dtype=np.uint8)
image = Image.fromarray(pixels)


def dice(seed=0): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', OPERATIONS)
def test_an_operation_keeps_size_and_does_something(name):
    out = np.asarray(operate(image, name, strength(name)))
    assert out.shape == pixels.shape and out.dtype == np.uint8 and not np.array_equal(out, pixels)


@pytest.mark.parametrize('name', ['ShearX', 'ShearY', 'TranslateXabs', 'TranslateYabs', 'Rotate'])
def test_moves_of_nothing_are_nothing(name): assert np.array_equal(np.asarray(operate(image, name, 0.)), pixels)


@pytest.mark.parametrize('name', ['Color', 'Contrast', 'Brightness', 'Sharpness'])
def test_enhancing_by_one_is_nothing(name): assert np.array_equal(np.asarray(operate(image, name, 1.)), pixels)


def test_every_operation_and_both_signs_are_drawn(monkeypatch):
    from vl_tutor.data import augment
    seen = []
    monkeypatch.setattr(augment, 'operate', lambda x, name, value: seen.append((name, value > 0)) or x)
    for k in range(400): rand_augment(image, generator=dice(k))
    assert {n for n, _ in seen} == set(OPERATIONS) and len(seen) == 800
    for name, (_, _, _, signed) in OPERATIONS.items():
        share = np.mean([positive for n, positive in seen if n == name])
        assert .2 < share < .8 if signed else share == 1


def test_the_same_dice_give_the_same_picture():
    for f in (rand_augment, simla_augment):
        a, b = (np.asarray(f(image, generator=dice(5))) for _ in range(2))
        assert np.array_equal(a, b)
        assert len({np.asarray(f(image, generator=dice(k))).tobytes() for k in range(12)}) > 4


def test_half_of_simlas_draws_do_nothing():
    same = np.mean([np.array_equal(np.asarray(simla_augment(image, ops=1, generator=dice(k))), pixels) for k in range(400)])
    assert .45 < same < .68                                      # half of them, and Identity one time in ten of the others


# ---- SIMLA's operations ----

def test_repaired_autocontrast_is_pillows():
    from PIL import ImageOps
    ours = each_colour(pixels, lambda c: stretch_table(c, official=False))
    assert np.abs(ours.astype(int) - np.asarray(ImageOps.autocontrast(image)).astype(int)).max() <= 1


def test_equalize_is_pillows():
    from PIL import ImageOps
    assert np.array_equal(each_colour(pixels, equal_table), np.asarray(ImageOps.equalize(image)))


def test_flat_channels_stay():
    flat = np.full((4, 4, 3), 7, np.uint8)
    assert np.array_equal(each_colour(flat, stretch_table), flat) and np.array_equal(each_colour(flat, equal_table), flat)


def test_sharpness_by_one_is_nothing_and_never_wraps_when_repaired():
    assert np.array_equal(sharpened(pixels, 1.), pixels)
    edge = np.full((5, 5, 3), 254, np.uint8)
    edge[:, 0] = 0
    assert sharpened(edge, 1.9, official=False)[2, 1, 0] == 255 and sharpened(edge, 1.9)[2, 1, 0] < 128


def test_sharpness_is_pillows_inside():
    from PIL import ImageEnhance
    theirs = np.asarray(ImageEnhance.Sharpness(image).enhance(.5)).astype(int)
    assert np.abs(sharpened(pixels, .5, official=False).astype(int) - theirs)[1:-1, 1:-1].max() <= 1


def test_warps_against_torch():
    "A turn about the middle, as `grid_sample` does it"
    import torch.nn.functional as F
    matrix = turned((28, 24), 21.)
    back = inverted(matrix)
    ys, xs = np.mgrid[:24, :28]
    x, y = (back[k, 0]*xs + back[k, 1]*ys + back[k, 2] for k in (0, 1))
    grid = torch.tensor(np.stack([2*x/27 - 1, 2*y/23 - 1], -1))[None]
    theirs = F.grid_sample(torch.tensor(pixels).permute(2, 0, 1)[None].double(), grid, align_corners=True)[0].permute(1, 2, 0).numpy()
    inside = (x > 0) & (x < 27) & (y > 0) & (y < 23)
    assert np.abs(warped(pixels, matrix).astype(int) - theirs)[inside].max() <= .51


def test_there_and_back():
    matrix = np.array([[1., .2, 3.], [-.1, .9, 2.]])
    both = np.vstack([matrix, [0, 0, 1]]) @ np.vstack([inverted(matrix), [0, 0, 1]])
    assert np.allclose(both, np.eye(3))
    assert np.array_equal(warped(pixels, [[1, 0, 0], [0, 1, 0]]), pixels)
    assert np.array_equal(warped(pixels, [[1, 0, 3], [0, 1, 0]])[:, 3:], pixels[:, :-3])
    assert (warped(pixels, [[1, 0, 99], [0, 1, 0]]) == 128).all()


@pytest.mark.parametrize('name', SIMLA_OPERATIONS)
def test_simlas_operations_keep_size(name):
    out = SIMLA_OPERATIONS[name][0](pixels, simla_strength(name))
    assert out.shape == pixels.shape and out.dtype == np.uint8


# ---- ImageNet ----

def test_nobody_elses_dice_are_touched():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = imagenet_train(image, 32, generator=dice(1))
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1]) and torch.get_rng_state().equal(before[2])
    assert first.equal(imagenet_train(image, 32, generator=dice(1))) and not first.equal(imagenet_train(image, 32, generator=dice(2)))


def test_dice_come_back_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError), seeded(dice()): random.random(); raise KeyError
    assert random.getstate() == before


def test_mixed_labels_tell_how_much_of_each_is_seen():
    ones = torch.stack([torch.full((3, 16, 16), float(k)) for k in range(4)])
    for k in range(20):
        both, soft = mixed(ones, torch.arange(4), 4, smoothing=0., generator=dice(k))
        assert soft.sum(1).allclose(torch.ones(4), atol=1e-5) and ones[1].eq(1).all()
        assert torch.allclose(both.mean((1, 2, 3)), (soft*torch.arange(4)).sum(1), atol=1e-4)
    with pytest.raises(ValueError, match='pairs'): mixed(ones[:3], torch.arange(3), 4)
    with pytest.raises(ValueError, match='classes'): mixed(ones, torch.arange(4) + 9, 4)


def test_smoothing_spreads_a_tenth():
    _, soft = mixed(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), 5, generator=dice())
    assert torch.allclose(soft[0], torch.tensor([.92, .02, .02, .02, .02]), atol=1e-5)


def test_a_wrong_name_is_one_sentence():
    with pytest.raises(ValueError, match='Melt'): operate(image, 'Melt', 1.)
