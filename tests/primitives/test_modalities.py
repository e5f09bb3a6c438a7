"Modalities: sums by hand, one norm for all, pictures as clips, offsets, places that restart, stretched tables, one-sentence errors."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.modalities import FrameTokens, Modalities, TextTokens, attribute_bits, caption_places, fuse, resize_time
from vl_tutor.primitives.positions import sincos_2d

quick = settings(max_examples=25, deadline=None, derandomize=True)


def make(**options):
    torch.manual_seed(0)
    return Modalities(30, 12, image_size=8, patch=4, places=6, frames=4, **options).eval()


@pytest.fixture(scope='module')
def senses(): return make()


def one_sentence(error): return '\n' not in str(error.value) and len(str(error.value)) < 400


def test_words_by_hand(senses):
    ids, t = torch.tensor([[4, 9, 4]]), senses.text
    want = F.layer_norm(t.word.weight[ids[0]] + t.place.weight[:3] + t.kind.weight[0], (12,), t.norm.weight, t.norm.bias, 1e-5)
    assert torch.allclose(t(ids)[0], want, atol=1e-6)
    after = make(place_first=False).text
    assert torch.allclose(after(ids)[0], F.layer_norm(after.word.weight[ids[0]] + after.kind.weight[0], (12,)) + after.place.weight[:3], atol=1e-6)


def test_frames_by_hand(senses):
    clip, f = torch.rand(2, 3, 3, 8, 8), senses.frames
    tokens = f(clip, offset=1)
    assert tokens.shape == (2, 12, 12) and tokens[1].shape == (12, 12)
    conv = f.patches.proj(clip[1, 2])                                      # (d 2 2)
    want = F.layer_norm(conv[:, 1, 0] + f.time.weight[3] + f.place[2], (12,), f.norm.weight, f.norm.bias, 1e-5)
    assert torch.allclose(tokens[1, 2*4 + 2], want, atol=1e-5)
    assert torch.equal(f.place.data, sincos_2d(2, 2, 12, first='row')) and not f.place.requires_grad


def test_options_change_what_they_say():
    plain, typed, after = make(), make(typed=True), make(place_first=False)
    image = torch.rand(1, 3, 8, 8)
    typed.frames.kind.weight.data.zero_()
    assert torch.allclose(plain.frames(image), typed.frames(image))
    assert not torch.allclose(plain.frames(image), after.frames(image))


def test_one_norm_for_all(senses):
    assert senses.text.norm is senses.frames.norm is senses.norm
    assert len({id(p) for p in senses.parameters()}) == len(list(senses.parameters()))


def test_offset_is_drawn_in_training_only():
    f, image = make().frames, torch.rand(1, 3, 8, 8)
    rows = [f(image, offset=o) for o in range(4)]
    assert torch.allclose(f(image), rows[0], atol=1e-6)
    f.train()
    dice = torch.Generator().manual_seed(0)
    seen = [next(o for o, row in enumerate(rows) if torch.allclose(row, drawn, atol=1e-6)) for drawn in (f(image, generator=dice) for _ in range(60))]
    assert set(seen) == {0, 1, 2, 3}
    assert {f.offset(4) for _ in range(9)} == {0}


def test_offset_belongs_to_the_call_not_the_sample():
    f = make().frames.train()
    tokens = f(torch.ones(5, 3, 8, 8))
    assert torch.equal(tokens, tokens[:1].expand(5, -1, -1))


@quick
@given(n=st.integers(1, 6), b=st.integers(1, 3))
def test_caption_places_restart(n, b):
    text = make().text
    words = torch.randint(30, (b, n))
    both = text(torch.cat([words, words], 1), caption_places(2*n))
    assert torch.allclose(both[:, :n], both[:, n:], atol=1e-6) and torch.allclose(both[:, :n], text(words), atol=1e-6)


def test_markers():
    old, new = make(), make(marker_word=7)
    assert torch.allclose(old.marker()[0, 0], F.layer_norm(old.text.word.weight[29], (12,)), atol=1e-6)
    assert torch.allclose(new.marker(), new.text(torch.tensor([[7]])), atol=1e-6)
    again = make()
    assert torch.equal(again.marker(), old.marker())                       # the newer one has changed no other model


def test_fused(senses):
    ids, keep = torch.tensor([[1, 2, 0]]*2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    line = senses(torch.rand(2, 2, 3, 8, 8), ids, keep=keep)
    assert line.lengths == (1, 8, 3) and line.ends == [1, 9, 12] and line.tokens.shape == (2, 12, 12)
    assert line.keep.dtype == torch.bool and line.keep.sum(1).tolist() == [11, 12]
    assert senses(ids=ids).lengths == (1, 3) and senses(torch.rand(2, 3, 8, 8)).lengths == (1, 4)
    assert torch.allclose(line.tokens[:, 0], senses.marker()[0, 0].expand(2, -1))


def test_fuse_spreads_single_rows_and_refuses_the_rest():
    a, b = torch.rand(1, 2, 4), torch.rand(3, 1, 4)
    assert fuse(a, b).tokens.shape == (3, 3, 4)
    for bad in [(a, torch.rand(3, 1, 5)), (torch.rand(2, 1, 4), b)]:
        with pytest.raises(ValueError, match='do not fit together') as error: fuse(*bad)
        assert one_sentence(error)
    with pytest.raises(ValueError, match='2 segments, but 1 masks'): fuse(a, b, keeps=[None])


@quick
@given(t=st.integers(1, 9), new=st.integers(1, 12))
def test_stretched_time_stays_between_its_rows(t, new):
    table = torch.rand(t, 3)
    out = resize_time(table, new)
    assert out.shape == (new, 3) and (out >= table.amin(0) - 1e-6).all() and (out <= table.amax(0) + 1e-6).all()
    if new == t: assert torch.equal(out, table)


def test_scaled_places_span_the_same_range():
    small, large = (FrameTokens(n*4, 4, 12, scale=4/n).place for n in (4, 8))
    assert torch.allclose(large[2*8 + 4], small[1*4 + 2], atol=1e-6)


@pytest.mark.parametrize('name,side,count', [('image_caption', 'input', 2), ('video_caption', 'input', 2), ('image_retrieval', 'target', 1), ('text_mlm', 'input', 1), ('Vocab_Word', 'input', 1), ('RTE-target', 'input', 1)])
def test_attribute_bits(name, side, count):
    rows = attribute_bits(name, side)
    assert rows.shape == (count, 8) and rows.dtype == torch.uint8
    assert (rows[:, 3] == 1).all() and (rows[:, 2] == 0).all() and (rows[:, 4] + rows[:, 5] == 1).all()


def test_mistakes(senses):
    calls = [(lambda: TextTokens(9, 4, places=2)(torch.zeros(1, 3).long()), 'place 2 asked for, but the table has 2 rows'), (lambda: caption_places(3), 'come in pairs'),
             (lambda: senses.frames(torch.rand(1, 5, 3, 8, 8)), '5 frames asked for'), (lambda: senses.frames(torch.rand(1, 2, 3, 8, 8), offset=3), 'from row 3 on'),
             (lambda: senses.frames(torch.rand(1, 3, 8, 9)), 'expected pictures'), (lambda: senses(), 'nothing to read'), (lambda: attribute_bits('VQA'), 'no attributes for VQA'),
             (lambda: resize_time(torch.rand(2, 2), 0), 'at least one frame')]
    for call, says in calls:
        with pytest.raises(ValueError, match=says) as error: call()
        assert one_sentence(error)


def test_gradients_reach_words_times_and_norm():
    senses = make()
    senses(torch.rand(1, 3, 8, 8), torch.tensor([[1, 2]]), offset=1).tokens.square().sum().backward()
    for p in (senses.text.word.weight, senses.text.kind.weight, senses.frames.time.weight, senses.frames.patches.proj.weight, senses.norm.weight): assert p.grad is not None
    assert senses.frames.time.weight.grad[0].abs().sum() == 0 and senses.frames.place.grad is None
