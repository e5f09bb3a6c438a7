"VLC: one row of words and patches, what padding and order may not change, heads, other sizes, first numbers, refusals."
from dataclasses import replace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.models.mae import Kept
from vl_tutor.models.vlc import (BASE, HEADS, LARGE, SIZES, VILT, VLC, Read, Seen, VLCConfig, WordHead, answer_head, init_vlc, joint_keep)
from vl_tutor.primitives.attention import record
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.primitives.positions import resize_positions

TINY = VLCConfig(16, 4, 16, 2, 2, 24, 23, 9, 12, 1, 3, 3, ('mlm', 'itm', 'vqa', 'nlvr2', 'rank'), 5)   # 16 patches


def build(config=TINY, seed=0, shaken=True):
    "A small VLC in evaluation mode, random numbers everywhere"
    torch.manual_seed(seed)
    model = VLC(config).eval()
    with torch.no_grad():
        for p in model.parameters() if shaken else (): p.add_(.2*torch.randn_like(p))
    return model


def batch(b=3, n=6, seed=0, size=(16, 16)):
    "Pictures, words, and a mask: each row one word shorter than the row before"
    gen = torch.Generator().manual_seed(seed)
    mask = torch.arange(n) < n - torch.arange(b)[:, None]
    return torch.randn(b, 3, *size, generator=gen), torch.randint(1, 23, (b, n), generator=gen), mask


def close(a, b, eps=1e-5): assert torch.allclose(a, b, atol=eps, rtol=eps), (a - b).abs().max()


# ---- the row ----

@torch.no_grad()
def test_the_row_is_text_class_token_patches_with_their_modalities():
    model = build()
    images, ids, _ = batch()
    tokens, _ = model.trunk.embed(images)
    row = torch.cat([model.text(ids) + model.modality.weight[0], tokens + model.modality.weight[2]], 1)
    out = model.trunk(row)
    read = model(images, ids, row=2)
    close(read.text, out[:, :6]); close(read.image, out[:, 6:])
    close(read.pooled, model.pooler(out[:, 0]).tanh())


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_padding_never_matters(seed, real):
    model = build()
    images, ids, _ = batch(1, 9, seed)
    mask = torch.arange(9)[None] < real
    other = torch.where(mask, ids, 23 - ids)                                    # other words behind the end
    padded = model(images, ids, mask)
    close(model(images, other, mask).pooled, padded.pooled)
    alone = model(images, ids[:, :real])
    close(alone.pooled, padded.pooled); close(alone.text, padded.text[:, :real]); close(alone.image, padded.image)


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_kept_patches_is_free(seed):
    model = build()
    images, ids, mask = batch(seed=seed)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    seen = model.see(images, noise=noise, ratio=.6)
    k = seen.kept.ids.shape[1]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    mixed = Seen(seen.tokens[:, torch.cat([torch.zeros(1, dtype=torch.long), order + 1])])
    a, b = model(seen, ids, mask), model(mixed, ids, mask)
    close(a.pooled, b.pooled); close(a.text, b.text); close(a.image[:, 1:][:, order], b.image[:, 1:])


@torch.no_grad()
def test_kept_rows_are_the_full_pictures_rows_and_nothing_else_gets_in():
    model = build()
    images, ids, mask = batch()
    noise = torch.rand(3, 16)
    full, some = model.see(images), model.see(images, noise=noise, ratio=.6)
    assert some.tokens.shape[1] == 1 + int(16*.4) and full.kept is None
    for i in range(3):
        assert torch.equal(some.tokens[i, 1:], full.tokens[i, 1:][noise[i].argsort()[:6]])
    hidden = images.clone()
    gone = some.kept.mask[0].bool().unflatten(0, (4, 4)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    hidden[0, :, gone] = 99.                                                    # what is removed cannot be seen
    assert torch.equal(model(hidden, ids, mask, noise=noise, ratio=.6).pooled, model(images, ids, mask, noise=noise, ratio=.6).pooled)


@torch.no_grad()
def test_seen_pictures_give_what_pixels_give_in_any_order_and_number():
    model = build()
    images, ids, mask = batch()
    rows = torch.tensor([2, 0, 0, 1, 2])
    noise = torch.rand(3, 16)
    for kw in ({}, dict(noise=noise, ratio=.5)):
        seen = model.see(images, **kw)
        again = {k: v[rows] if k == 'noise' else v for k, v in kw.items()}
        a, b = model(seen[rows], ids[rows], mask[rows]), model(images[rows], ids[rows], mask[rows], **again)
        close(a.pooled, b.pooled); close(a.image, b.image)
        if kw: assert torch.equal(a.kept.restore, b.kept.restore) and torch.equal(seen[1:].kept.mask, seen.kept.mask[1:])
        else: assert a.kept is None
    assert len(seen) == 3 and len(seen[rows]) == 5


@torch.no_grad()
def test_padding_of_pictures_is_hidden_as_padding_of_text_is():
    model = build()
    images, ids, mask = batch()
    seen = model.see(images)
    filled = Seen(torch.cat([seen.tokens, torch.randn(3, 4, 16)], 1), torch.arange(21)[None].expand(3, -1) < 17)
    close(model(filled, ids, mask).pooled, model(seen, ids, mask).pooled)
    close(model(filled, ids).pooled, model(seen, ids).pooled)                   # also where every word is real
    assert joint_keep(ids, mask, seen).shape == (3, 6 + 17) and joint_keep(ids, None, seen) is None
    assert filled[torch.tensor([1])].keep.shape == (1, 21)


@torch.no_grad()
def test_words_look_at_patches_and_patches_at_words_and_nobody_at_padding():
    model = build()
    images, ids, mask = batch()
    with record(model) as rec: model(images, ids, mask)
    w = rec['trunk.encoder.blocks.0.attn']                                      # (b h n m)
    assert (w[:, :, :6, 7:] > 0).all() and (w[:, :, 7:, 0] > 0).all()
    assert not w[2, :, :, 4:6].any()                                            # row 2 has four words


def test_layout_names_every_token():
    spans = build().layout(words=6).streams['joint']
    assert [(s.name, s.start, s.stop, s.grid) for s in spans] == [('text', 0, 6, None), ('cls', 6, 7, None), ('image', 7, 23, (4, 4))]


# ---- the decoder ----

@torch.no_grad()
def test_the_decoder_never_sees_text_tokens_but_the_caption_reaches_it():
    model = build()
    images, ids, mask = batch()
    read = model(images, ids, mask, noise=torch.rand(3, 16), ratio=.5)
    painted = model.pixels(read)
    assert painted.shape == (3, 16, 48)
    assert torch.equal(model.pixels(replace(read, text=torch.randn_like(read.text), pooled=None)), painted)
    told = model.pixels(model(images, ids.flip(0), mask, noise=torch.rand(3, 16), ratio=.5))
    assert (told - painted).abs().max() > 1e-3


# ---- heads ----

@torch.no_grad()
def test_the_word_head_spelled_out():
    torch.manual_seed(0)
    head, x = WordHead(6, 11), torch.randn(2, 3, 6)
    with torch.no_grad(): head.bias.copy_(torch.randn(11))
    h = x @ head.dense.weight.T + head.dense.bias
    h = h*.5*(1 + torch.erf(h/2**.5))                                           # the exact GELU
    h = (h - h.mean(-1, keepdim=True))/h.var(-1, keepdim=True, unbiased=False).sqrt()
    close(head(x), h @ head.words.weight.T + head.bias)
    assert head.words.bias is None and head.norm.eps == 1e-12


def test_epsilons_stand_where_the_released_ones_stand():
    model = build()
    eps = {n: m.eps for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    want = lambda n: 1e-12 if n in ('text.norm', 'heads.mlm.norm') else 1e-5 if n.startswith(('heads.vqa', 'heads.nlvr2')) else 1e-6
    assert eps == {n: want(n) for n in eps} and len(eps) == 2 + 2 + 2*3 + 2


@torch.no_grad()
def test_every_head_reads_what_it_should():
    model = build()
    images, ids, mask = batch()
    pooled = model(images, ids, mask).pooled
    close(model.match(images, ids, mask), model.heads['itm'](pooled))
    close(model.answer(images, ids, mask), model.heads['vqa'](pooled))
    close(model.rank(images, ids, mask), model.heads['rank'](pooled)[:, 0])
    assert model.answer(images, ids).shape == (3, 5) and model.head('mlm')(model(images, ids).text).shape == (3, 6, 23)
    assert [type(m).__name__ for m in answer_head(4, 8, 2)] == ['Linear', 'LayerNorm', 'GELU', 'Linear']
    assert set(HEADS) == {'mlm', 'itm', 'vqa', 'nlvr2', 'rank'} == set(model.heads)


@torch.no_grad()
def test_a_pair_is_read_with_rows_1_and_2_picture_0_first():
    model = build()
    images, ids, mask = batch()
    pair = torch.stack([images, images.roll(1, 0)], 1)
    both = torch.cat([model(pair[:, 0], ids, mask, row=1).pooled, model(pair[:, 1], ids, mask, row=2).pooled], 1)
    close(model.judge(pair, ids, mask), model.heads['nlvr2'](both))
    model.modality.weight[2] = model.modality.weight[1]
    again = torch.cat([model(pair[:, i], ids, mask).pooled for i in (0, 1)], 1)
    close(model.judge(pair, ids, mask), model.heads['nlvr2'](again))


# ---- gradients and precision ----

def test_gradients_reach_everything_that_was_used_and_not_the_padding_word():
    model = build().train()
    images, ids, mask = batch()
    ids = ids.masked_fill(~mask, 0)
    read = model(images, ids, mask, noise=torch.rand(3, 16), ratio=.5)
    (model.heads['mlm'](read.text)[mask].square().mean() + model.pixels(read).square().mean() + model.heads['itm'](read.pooled).square().mean()).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    unused = {n for n in dict(model.named_parameters()) if n.startswith(('heads.vqa', 'heads.nlvr2', 'heads.rank'))}
    assert still == unused | {'trunk.positions', 'decoder.positions'}, still ^ unused
    grad = model.text.words.weight.grad
    assert not grad[0].any() and grad[ids[0]].abs().sum(1).all()
    assert not model.text.types.weight.grad[1].any() and not model.modality.weight.grad[2].any()   # rows nobody used


@torch.no_grad()
def test_bf16_stays_near():
    model = build(shaken=False)
    images, ids, mask = batch()
    full = model.match(images, ids, mask)
    with torch.autocast('cpu', torch.bfloat16): half = model.match(images, ids, mask)
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < .05


def test_only_the_text_drops_out():
    model = build(shaken=False).train()
    images, ids, mask = batch()
    torch.manual_seed(1); a = model(images, ids, mask).pooled
    assert not torch.equal(a, model(images, ids, mask).pooled)
    model.text.eval()
    assert torch.equal(model(images, ids, mask).pooled, model(images, ids, mask).pooled)


# ---- other sizes ----

@torch.no_grad()
@pytest.mark.parametrize('size', [24, 8, (16, 32), (24, 12)])
def test_other_sizes_stretch_the_two_tables_and_copy_the_rest(size):
    model = build()
    other = model.resized(size)
    grid = other.trunk.patches.grid
    for name, p in other.state_dict().items():
        mine = model.state_dict()[name]
        if name in ('trunk.positions', 'decoder.positions'): mine = resize_positions(mine, (4, 4), grid)
        assert torch.equal(p, mine) and p.data_ptr() != model.state_dict()[name].data_ptr(), name
    assert {n for n, p in other.named_parameters() if not p.requires_grad} == {'trunk.positions', 'decoder.positions'}
    side = (size, size) if isinstance(size, int) else size
    images, ids, mask = batch(size=side)
    read = other(images, ids, mask, noise=torch.rand(3, grid[0]*grid[1]), ratio=.5)
    assert other.pixels(read).shape == (3, grid[0]*grid[1], 48) and not other.training and model.train().resized(16).training


# ---- sizes and first numbers ----

@pytest.mark.parametrize('name,total', dict(base=160_526_180, vqa=143_376_225, nlvr2=138_828_842, retrieval=136_463_403, large=394_815_588, vilt=135_660_132,
    vilt_vqa=117_588_577, vilt_nlvr2=113_962_794, vilt_retrieval=111_597_355).items())
def test_published_sizes_have_as_many_numbers_as_the_released_files(name, total):
    with torch.device('meta'): model = VLC(SIZES[name])
    assert sum(v.numel() for v in model.state_dict().values()) + 40 == total    # 40: a buffer of place numbers
    assert SIZES['base'] is BASE and SIZES['large'] is LARGE and SIZES['vilt'] is VILT


def test_first_numbers_are_the_released_ones():
    model = init_vlc(VLC(replace(SIZES['tiny'], vocab_size=900)), 3)
    named = dict(model.named_parameters())
    for name, p in named.items():
        if name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight')): assert (p == 1).all(), name
        elif name.endswith('patches.proj.bias'): assert p.any()                 # torch's own
        elif name.endswith('bias'): assert not p.any(), name
        elif name in ('trunk.cls', 'decoder.mask', 'text.words.weight', 'modality.weight', 'pooler.weight', 'heads.mlm.dense.weight', 'heads.itm.weight'):
            assert abs(p.std().item() - .02) < .006, name
        elif name.endswith('.weight') and name.startswith(('trunk.', 'decoder.')):
            out, into = p.flatten(1).shape
            assert p.abs().max() <= (6/(out + into))**.5 + 1e-6 and abs(p.std().item()*((out + into)/2)**.5 - 1) < .1, name
    assert model.text.words.weight[0].any()
    again = init_vlc(VLC(replace(SIZES['tiny'], vocab_size=900)), 3).state_dict()
    same = {n for n, v in model.state_dict().items() if torch.equal(v, again[n])}
    assert same >= set(named) - {'trunk.patches.proj.bias'}


# ---- refusals ----

def test_mistakes_get_one_sentence():
    model = build()
    images, ids, mask = batch()
    with expect_fail("no head for ['mim']; known: mlm, itm, vqa, nlvr2, rank"): VLC(replace(TINY, tasks=('mim',)))
    with expect_fail("no 'vqa' head, only mlm"): VLC(replace(TINY, tasks=('mlm',))).answer(images, ids)
    with expect_fail('only none'): VLC(replace(TINY, tasks=())).match(images, ids)
    with expect_fail('3 pictures for 2 texts'): model(images, ids[:2])
    with expect_fail('a text of 10 tokens, but this model reads at most 9'): model(images, torch.ones(3, 10, dtype=torch.long))
    with expect_fail('(3, 3, 20, 16)'): model(torch.randn(3, 3, 20, 16), ids)
    with expect_fail('no patch was removed'): model.pixels(model(images, ids))
    with expect_fail('no pixel decoder'): VLC(replace(TINY, decoder_layers=0)).pixels(model(images, ids, noise=torch.rand(3, 16), ratio=.5))
    with expect_fail('three modality rows'): VLC(replace(TINY, modalities=2)).judge(images[:, None].repeat(1, 2, 1, 1, 1), ids)
    with expect_fail('leaves none of 16 patches'): model(images, ids, noise=torch.rand(3, 16), ratio=.95)
    assert isinstance(model(images, ids), Read) and isinstance(model.see(images, noise=torch.rand(3, 16), ratio=.5).kept, Kept)
