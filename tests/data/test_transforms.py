"Every system's pixels: against torchvision where it is the recipe, against closed forms elsewhere, and the same for the same dice."
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings, strategies as st
from PIL import Image
from vl_tutor.data.transforms import (EVALUATE, HALF, IMAGENET_MEAN, TRAIN, TRANSFORMS, crop_box, cut, frames_short_side, middle, mirrored_boxes,
                                      mirrored_text, normalised, padded_pictures, perceiver_video, short_side, squeezed, three_squares,
                                      uni_video, vilt_size)

SIZES = [(58, 44), (37, 63), (64, 64), (33, 32), (200, 31)]


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def dice(seed=0): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('side', [16, 31])
def test_short_side_and_middle_are_torchvisions(size, side):
    image = picture(size)
    theirs = tv.resize(image, side, interpolation=tv.InterpolationMode.BICUBIC)
    assert np.array_equal(np.asarray(short_side(image, side)), np.asarray(theirs))
    assert np.array_equal(np.asarray(middle(theirs, side)), np.asarray(tv.center_crop(theirs, side)))


@pytest.mark.parametrize('how', ['bicubic', 'bilinear', 'lanczos'])
def test_squeezed_keeps_no_shape(how):
    assert squeezed(picture((50, 20)), 24, how).size == (24, 24)
    flat = Image.new('RGB', (50, 20), (9, 99, 199))
    assert np.asarray(squeezed(flat, 24, how)).reshape(-1, 3).tolist() == [[9, 99, 199]]*576


@pytest.mark.parametrize('name', EVALUATE)
def test_evaluation_throws_no_dice(name):
    image, state = picture((58, 44)), torch.get_rng_state()
    first, second = EVALUATE[name](image, 32), EVALUATE[name](image, 32)
    assert first.equal(second) and torch.get_rng_state().equal(state)
    assert first.dtype == torch.float32 and first.shape[0] == 3 and first.isfinite().all()


@pytest.mark.parametrize('name', TRAIN)
def test_training_follows_its_dice_alone(name):
    image, state = picture((58, 44)), torch.get_rng_state()
    views = [TRAIN[name](image, 32, generator=dice(k)) for k in (1, 1, 2, 3)]
    assert views[0].equal(views[1]) and not (views[0].equal(views[2]) and views[0].equal(views[3]))
    assert all(v.shape == (3, 32, 32) and v.isfinite().all() for v in views) and torch.get_rng_state().equal(state)


def test_the_table_holds_both():
    assert len(TRANSFORMS) == len(EVALUATE) + len(TRAIN) and {'vlc/evaluate', 'vlc/train', 'imagenet/train'} <= set(TRANSFORMS)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_a_cut_lies_inside(w, h, seed):
    top, left, high, wide = crop_box((w, h), (.08, 1.), generator=dice(seed))
    assert 0 <= top and 0 <= left and 1 <= high and 1 <= wide and top + high <= h and left + wide <= w


def test_a_cut_is_torchvisions():
    image = picture((58, 44))
    theirs = tv.resized_crop(image, 3, 5, 20, 31, [24, 24], interpolation=tv.InterpolationMode.BICUBIC)
    assert np.array_equal(np.asarray(cut(image, (3, 5, 20, 31), 24)), np.asarray(theirs))
    assert np.array_equal(np.asarray(cut(image, (3, 5, 20, 31), 24, flip=True)), np.asarray(theirs)[:, ::-1])


def test_areas_and_shapes_are_spread_as_asked():
    boxes = [crop_box((400, 300), (.5, 1.), generator=g) for g in [dice()] for _ in range(2000)]
    share = torch.tensor([h*w/120000 for _, _, h, w in boxes])
    shape = torch.tensor([w/h for _, _, h, w in boxes])
    assert share.min() > .49 and share.max() <= 1. and shape.min() > .74 and shape.max() < 1.35


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 3000), st.integers(8, 3000))
def test_vilt_sizes_are_whole_patches_under_the_cap(w, h):
    wide, high = vilt_size((w, h))
    assert wide % 32 == 0 == high % 32 and 32 <= min(wide, high) <= 384 and max(wide, high) <= 640
    assert vilt_size((h, w)) == (high, wide)


def test_padding_is_below_and_to_the_right():
    batch = padded_pictures([torch.ones(3, 2, 5), torch.full((3, 4, 1), 2.)])
    assert batch.shape == (2, 3, 4, 5) and batch[0, :, :2].eq(1).all() and batch[0, :, 2:].eq(0).all() and batch[1, :, :, 1:].eq(0).all()


# ---- mirrors ----

@pytest.mark.parametrize('text', ['a ring left of a star', 'Left, then RIGHT!', 'the leftmost of the righthand ones', 'a leftover copyright', ''])
def test_mirroring_twice_is_nothing(text):
    assert mirrored_text(mirrored_text(text)).lower() == text.lower()


def test_only_whole_words_are_mirrored():
    assert mirrored_text('a leftover copyright') == 'a leftover copyright'
    assert mirrored_text('Right of it') == 'Left of it'


def test_mirrored_boxes_frame_the_mirrored_object():
    from vl_tutor.world.scenes import World
    world = World('pair', 'test')
    batch = world.batch(range(20))
    flipped = mirrored_boxes(batch['boxes'], 48)
    assert flipped[..., 2].ge(flipped[..., 0]).all() and mirrored_boxes(flipped, 48).allclose(batch['boxes'])
    for image, old, new in zip(batch['image'], batch['boxes'].round().long().tolist(), flipped.round().long().tolist()):
        for (l, t, r, b), (l2, t2, r2, b2) in zip(old, new): assert image.flip(-1)[:, t2:b2, l2:r2].equal(image[:, t:b, l:r].flip(-1))


# ---- clips ----

@pytest.mark.parametrize('shape', [(40, 54), (54, 40), (40, 40), (31, 40)])
def test_three_squares(shape):
    video = torch.arange(2*3*shape[0]*shape[1]).view(2, 3, *shape).float()
    squares, side = three_squares(video), min(shape)
    assert squares.shape == (3, 2, 3, side, side)
    assert squares[0].equal(video[..., :side, :side]) and squares[2].equal(video[..., -side:, -side:])
    assert frames_short_side(video, 16).shape[-2:] == (int(16*shape[0]/side), int(16*shape[1]/side))


def test_numbers_of_clips():
    video = torch.randint(256, (2, 3, 40, 54), dtype=torch.uint8)
    assert uni_video(video, 32).shape == (3, 2, 3, 32, 32) and perceiver_video(video).equal(normalised(video, HALF, HALF))
    assert perceiver_video(None, 4, 8).eq(-1).all()


def test_numbers_of_pictures():
    image = picture((5, 4))
    x = normalised(image)
    assert x.allclose((torch.from_numpy(np.array(image)).permute(2, 0, 1)/255 - torch.tensor(IMAGENET_MEAN)[:, None, None])
                      / torch.tensor((.229, .224, .225))[:, None, None])


@pytest.mark.parametrize('f', list(EVALUATE.values())[:6])
def test_a_file_that_is_no_picture_gets_one_sentence(f, tmp_path):
    (tmp_path/'x.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='x.png'): f(tmp_path/'x.png', 32)
