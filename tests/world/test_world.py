"The world's promises: the same bytes for everyone, splits that keep their word, drawings that equal their slow twin, boxes that fit."
import hashlib
import json
from pathlib import Path
import pytest
import torch
from torch.utils.data import DataLoader
from vl_tutor.world.dice import GOLDEN, bits, mix, stream_key, uniform
from vl_tutor.world.drawing import KINDS, SHAPES, compose, draw_ref, handwriting, object_boxes, paint, stamp
from vl_tutor.world.language import captions
from vl_tutor.world.scenes import HELD_OUT, LEVELS, SKINS, SPLITS, WORLD_VERSION, World, scan_range

stored = json.loads((Path(__file__).parent/'stored_bytes.json').read_text())
everywhere = [(level, skin, split) for level in LEVELS for skin in SKINS for split in SPLITS]


def sha(*parts): return hashlib.sha256(b''.join(parts)).hexdigest()


def looks(scenes): return [tuple(row) for row in torch.cat([scenes.kind, scenes.colour, scenes.size, scenes.x, scenes.y], 1).tolist()]


# ---- the same bytes ----

@pytest.mark.parametrize('name', stored['sha256'])
def test_stored_bytes(name):
    "Any change of a pixel or a caption must come with a new WORLD_VERSION (and new digests here)"
    level, skin, split, side, n = name.split('/')
    world = World(level, split, skin=skin, image_size=int(side))
    scenes = world.scenes(range(int(n)))
    assert stored['world_version'] == WORLD_VERSION
    assert sha(world.draw(scenes).numpy().tobytes(), '\n'.join(captions(scenes)).encode()) == stored['sha256'][name]


def test_every_level_and_skin_is_stored():
    assert {tuple(name.split('/')[:2]) for name in stored['sha256'] if name.endswith('/1000')} == {(a, b) for a in LEVELS for b in SKINS}


@pytest.mark.parametrize('level', LEVELS)
def test_same_bytes_for_any_batch_size_and_order(level):
    world = World(level, skin='mixed')
    whole = world.draw(world.scenes(range(120)))
    for size in (1, 7, 50):
        assert torch.cat([world.draw(world.scenes(range(i, min(i + size, 120)))) for i in range(0, 120, size)]).equal(whole)
    order = mix(torch.arange(120)).argsort()
    assert world.draw(world.scenes(order)).equal(whole[order])


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers', [0, 1, 2, 4])
def test_same_bytes_for_any_worker_count(workers):
    world = World('few', skin='mixed', size=64)
    whole = world.batch(range(64))
    samples = [s for batch in DataLoader(world, 10, num_workers=workers, collate_fn=list) for s in batch]
    assert torch.stack([s['image'] for s in samples]).equal(whole['image'])
    assert [s['caption'] for s in samples] == whole['caption']


def test_same_bytes_for_any_thread_count():
    world, before, made = World('crowd', skin='mixed'), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(world.draw(world.scenes(range(300))))
    finally: torch.set_num_threads(before)
    assert made[0].equal(made[1]) and made[0].equal(made[2])


def test_sample_is_its_place_in_the_batch():
    world = World('few', 'test', skin='mixed', size=9)
    batch = world.batch(range(9))
    for i, sample in enumerate(world):
        n = batch['scenes'].present[i].sum()
        assert sample['image'].equal(batch['image'][i]) and sample['caption'] == batch['caption'][i]
        assert sample['boxes'].equal(batch['boxes'][i, :n]) and sample['kind'].equal(batch['scenes'].kind[i, :n])
    assert i == 8                                                   # iterating stops at the end
    assert world[-1]['caption'] == world[8]['caption']


@pytest.mark.parametrize('other', [dict(seed=1), dict(split='valid'), dict(level='one'), dict(skin='mixed')])
def test_every_setting_has_its_own_stream(other):
    mine, theirs = World(), World(**other)
    a, b = mine.scenes(range(2000)), theirs.scenes(range(2000))
    assert not set(a.code.tolist()) & set(b.code.tolist())


def test_image_size_changes_scale_alone():
    small, large = (World('crowd', skin='mixed', image_size=s).scenes(range(50)) for s in (48, 96))
    assert small.kind.equal(large.kind) and large.x.equal(2*small.x) and large.r.equal(2*small.r)
    assert captions(small) == captions(large)


# ---- splits keep their word ----

@pytest.mark.parametrize('level,skin,split', everywhere)
def test_scene_rules(level, skin, split):
    n = 300
    s = World(level, split, skin=skin).scenes(range(n))
    fewest, most = LEVELS[level].longer if split == 'long' else LEVELS[level].objects
    count = s.present.sum(1)
    assert count.min() == fewest and count.max() == most and s.kind.shape == (n, most)
    held = (s.colour == HELD_OUT[s.kind]) & s.present
    assert held.any(1).all() if split == 'combos' else not held.any()
    assert (s.is_digit == (s.kind >= len(SHAPES))).all() and (s.is_digit.all(1) | ~s.is_digit.any(1)).all()
    assert s.is_digit.float().mean() == dict(shapes=0, digits=1).get(skin, s.is_digit.float().mean())
    assert ((s.scan >= 0) == s.is_digit).all()
    first, end = scan_range(split)
    assert ((s.scan[s.is_digit] >= first) & (s.scan[s.is_digit] < end)).all()
    assert (handwriting()[1][s.scan[s.is_digit]] + len(SHAPES) == s.kind[s.is_digit]).all()
    assert s.clutter.all() == LEVELS[level].clutter and (s.ground[:, 0] > 0).all() == (split == 'backgrounds')


@pytest.mark.parametrize('level,skin,split', everywhere)
def test_nobody_touches_and_nobody_leaves(level, skin, split):
    s = World(level, split, skin=skin).scenes(range(300))
    boxes = torch.stack([s.x - s.r, s.y - s.r, s.x + s.r, s.y + s.r], -1)
    assert boxes.min() >= .99 and boxes.max() <= 47.01
    gap = torch.stack([s.x, s.y], -1)
    gap = (gap[:, :, None] - gap[:, None]).abs().amax(-1) + torch.eye(s.x.shape[1])*99
    assert (gap >= s.r[:, :, None] + s.r[:, None] + .98).all()
    if s.x.shape[1] > 2:                                            # a list from left to right needs columns
        assert ((s.x[:, :, None] - s.x[:, None]).abs() + torch.eye(s.x.shape[1])*99).min() > 1.7


@pytest.mark.parametrize('skin', SKINS)
def test_pairs_have_one_clear_relation_and_differ(skin):
    s = World('pair', skin=skin).scenes(range(6000))
    away = torch.cat([s.x.diff(dim=1), s.y.diff(dim=1)], 1)
    assert (away.abs().amax(1) >= 1.4*away.abs().amin(1)).all()
    across = (away[:, 0].abs() > away[:, 1].abs()).float()
    assert abs(across.mean() - .5) < .03 and abs((away > 0).float().mean() - .5) < .03
    alike = (s.kind[:, 0] == s.kind[:, 1]) & (s.colour[:, 0] == s.colour[:, 1]) & (s.size[:, 0] == s.size[:, 1])
    assert not alike.any()


def test_attributes_are_balanced_and_independent():
    s = World('pair').scenes(range(12_000))
    for name, faces in dict(kind=6, colour=6, size=2).items():
        share = getattr(s, name).flatten().bincount(minlength=faces)/24_000
        assert (share*faces - 1).abs().max() < .06, name
        both = (getattr(s, name)[:, 0]*faces + getattr(s, name)[:, 1]).bincount(minlength=faces**2)/12_000
        assert (both*faces**2 - 1).abs().max() < .25, name          # one tells nothing about the other


def test_held_out_is_spread_over_colours():
    assert len(HELD_OUT) == len(KINDS) and HELD_OUT.bincount(minlength=6).min() >= 2
    assert sorted(HELD_OUT[:len(SHAPES)].tolist()) == list(range(6))


def test_scans_of_splits_are_apart():
    ranges = {split: set(range(*scan_range(split))) for split in SPLITS}
    assert not ranges['train'] & ranges['valid'] and not (ranges['train'] | ranges['valid']) & ranges['test']
    assert all(ranges[s] == ranges['test'] for s in ('combos', 'long', 'backgrounds'))
    drawn = {split: set(World('pair', split, skin='digits').scenes(range(3000)).scan.flatten().tolist()) for split in ('train', 'test', 'combos')}
    assert not drawn['train'] & (drawn['test'] | drawn['combos'])


@pytest.mark.parametrize('skin', SKINS)
def test_no_test_scene_is_in_training(skin):
    train = World('pair', skin=skin).scenes(range(30_000))
    known = set(looks(train))
    assert len(known) == 30_000                                     # no scene twice
    for split in ('valid', 'test', 'combos', 'backgrounds'): assert not known & set(looks(World('pair', split, skin=skin).scenes(range(2000))))


# ---- pixels and boxes ----

@pytest.mark.parametrize('level,skin,split', everywhere)
def test_painter_equals_its_slow_twin(level, skin, split):
    world = World(level, split, skin=skin)
    s = world.scenes(range(6))
    image = world.draw(s)
    for i in range(6): assert (image[i].int() - draw_ref(s, i, 48).int()).abs().max() <= 1


@pytest.mark.parametrize('side', [24, 31, 64, 224])
def test_painter_at_other_sizes(side):
    s = World('few', skin='mixed', image_size=side).scenes(range(3))
    for i in range(3): assert (paint(s, side)[i].int() - draw_ref(s, i, side).int()).abs().max() <= (1 if side >= 48 else 12)


@pytest.mark.parametrize('skin', ['shapes', 'digits'])
def test_boxes_hug_the_ink(skin):
    "Against the box of the pixels that the object really covers"
    s = World('one', skin=skin).scenes(range(1500))
    ink, _, places, *_ = stamp(s, 48)
    seen = torch.zeros(1500*48*48).scatter_add_(0, places.flatten(), ink.flatten()).view(1500, 48, 48) > .3
    ends = [m.int().argmax(1) for m in (seen.any(1), seen.any(2))] + [48 - m.flip(1).int().argmax(1) for m in (seen.any(1), seen.any(2))]
    true, boxes = torch.stack(ends, 1).float(), object_boxes(s)[:, 0]
    both = (torch.minimum(true[:, 2:], boxes[:, 2:]) - torch.maximum(true[:, :2], boxes[:, :2])).clamp(min=0).prod(1)
    iou = both/((true[:, 2:] - true[:, :2]).prod(1) + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)
    assert iou.mean() > .85 and iou.quantile(.01) > .65
    for kind in s.kind.unique(): assert iou[s.kind[:, 0] == kind].mean() > .8, KINDS[kind]


def test_boxes_of_absent_objects_are_zero():
    s = World('few').scenes(range(50))
    assert (object_boxes(s)[~s.present] == 0).all() and (object_boxes(s)[s.present].abs().sum(-1) > 0).all()


@pytest.mark.parametrize('patch', [4, 8, 16])
def test_patch_labels_by_counting_pixels(patch):
    world = World('few', skin='mixed')
    s = world.scenes(range(40))
    labels, fine = world.patch_labels(s, patch), 8
    at = (torch.arange(48*fine) + .5)/fine
    for i in range(40):
        inside = torch.stack([((at >= l) & (at < r))[None]*((at >= t) & (at < b))[:, None] for l, t, r, b in object_boxes(s)[i].tolist()]).float()
        share = torch.nn.functional.avg_pool2d(inside[None], patch*fine)[0].flatten(1)        # (o p)
        most, who = share.max(0)
        clear = (most - 1/8).abs() > .05                            # leave the close calls to rounding
        if len(share) > 1: clear &= (share.topk(2, 0).values.diff(dim=0)[0].abs() > .05) | (most < 1/8)
        assert (labels['present'][i].bool() == (most > 1/8))[clear].all()
        for k in ('kind', 'colour', 'size'):
            want = torch.where(most > 1/8, getattr(s, k)[i][who], -1)
            assert (labels[k][i] == want)[clear].all()


def test_changing_a_colour_changes_that_object_alone():
    s = World('pair').scenes([5])
    before = paint(s, 48)
    s.colour[0, 0] = (s.colour[0, 0] + 1) % 6
    rows, cols = (paint(s, 48) != before).any(1)[0].nonzero(as_tuple=True)
    left, top, right, bottom = object_boxes(s)[0, 0].tolist()
    assert left - 1 <= cols.min() and cols.max() <= right + 1 and top - 1 <= rows.min() and rows.max() <= bottom + 1


# ---- dice ----

def test_dice_equal_plain_python():
    def mix_int(z):
        z = ((z ^ (z >> 30))*0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27))*0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)
    code = [stream_key('a', i) for i in range(20)]
    want = [[mix_int((c + (k + (9 << 20))*GOLDEN) % 2**64) >> 32 for k in range(6)] for c in code]
    assert bits(torch.tensor(code), 9, 2, 3).flatten(1).tolist() == want
    assert uniform(torch.tensor(code), 9, 6).tolist() == [[(b >> 8)/2**24 for b in row] for row in want]


def test_keys_do_not_depend_on_the_run(): assert stream_key('1', 0, 'train', 'pair', 'shapes') == World().key == -5983744242982545935


# ---- mistakes are answered in words ----

@pytest.mark.parametrize('call,words', [
    (lambda: World('hundred'), 'one, pair, few, crowd'), (lambda: World(split='exam'), 'backgrounds'), (lambda: World(skin='fur'), 'digits'),
    (lambda: World(image_size=8), '24'), (lambda: World().scenes(5), 'sequence'), (lambda: World().scenes([[1]]), 'sequence'),
    (lambda: World().patch_labels(World().scenes([0]), 7), '7 does not divide'), (lambda: compose([]), 'at least one'),
    (lambda: compose([dict(kind='dog', colour='red', x=9, y=9, r=5)]), "'dog'"), (lambda: bits(torch.rand(2), 0), 'float32')])
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_index_beyond_the_end():
    with pytest.raises(IndexError): World(size=3)[3]
