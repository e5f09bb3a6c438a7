"The masked auto-encoder against transformers' ViTMAE with copied weights, its slow twins, and what must not matter."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tensors import near, shake
from vl_tutor.models.mae import (MAE, PixelDecoder, ViTTrunk, drop_patches, drop_patches_ref, init_mae, pick, pixel_loss, pixel_targets, put_back, put_back_ref)
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.primitives.patches import patchify
from vl_tutor.training.checkpoints import KeyMap
from vl_tutor.models.backbones import both


def build(side=16, patch=4, width=16, layers=2, heads=2, dim=12, deep=1, dheads=3, **kw):
    torch.manual_seed(0)
    return shake(MAE(ViTTrunk(image_size=side, patch_size=patch, width=width, layers=layers, heads=heads, **kw), dim=dim, layers=deep, heads=dheads))


# ---- transformers' class ----

def hf_rules():
    "How transformers 5 names its ViTMAE"
    def layer(theirs, ours):
        qkv = ' + '.join(f'{theirs}.{{i}}.attention.{n}_proj' for n in 'qkv')
        names = {'attention.o_proj': 'attn.to_out', 'layernorm_before': 'norm1', 'layernorm_after': 'norm2', 'mlp.fc1': 'mlp.up', 'mlp.fc2': 'mlp.down'}
        return [*both(qkv, ours + '.{i}.attn.to_qkv', 'cat'), *[r for a, b in names.items() for r in both(f'{theirs}.{{i}}.{a}', f'{ours}.{{i}}.{b}')]]
    plain = {'vit.embeddings.patch_embeddings.projection': 'trunk.patches.proj', 'vit.layernorm': 'trunk.norm', 'decoder.decoder_embed': 'decoder.embed',
             'decoder.decoder_norm': 'decoder.norm', 'decoder.decoder_pred': 'decoder.pixels'}
    return [('vit.embeddings.cls_token', 'trunk.cls', 'squeeze squeeze'), ('vit.embeddings.position_embeddings', 'trunk.positions', 'squeeze'),
            ('decoder.mask_token', 'decoder.mask', 'squeeze squeeze'), ('decoder.decoder_pos_embed', 'decoder.positions', 'squeeze'),
            *layer('vit.layers', 'trunk.encoder.blocks'), *layer('decoder.decoder_layers', 'decoder.blocks.blocks'), *[r for a, b in plain.items() for r in both(a, b)]]


@pytest.mark.parametrize('normalise', [False, True])
@pytest.mark.parametrize('ratio', [.5, .75])
@torch.no_grad()
def test_mae_is_transformers_vitmae(normalise, ratio):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    torch.manual_seed(0)
    theirs = shake(ViTMAEForPreTraining(ViTMAEConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=24, patch_size=6, mask_ratio=ratio,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=36, norm_pix_loss=normalise, layer_norm_eps=1e-6)))
    ours = MAE(ViTTrunk(image_size=24, patch_size=6, width=24, layers=2, heads=3, hidden=40), dim=16, layers=2, heads=2, hidden=36)
    assert not ours.trunk.positions.requires_grad and not ours.decoder.positions.requires_grad
    theirs.vit.embeddings.position_embeddings.copy_(ours.trunk.positions)     # their tables are zero until weights are loaded
    theirs.decoder.decoder_pos_embed.copy_(ours.decoder.positions)
    ours.load_state_dict(KeyMap(hf_rules()).to_ours(theirs.state_dict(), ours.state_dict()))
    images, noise = torch.randn(3, 3, 24, 24), torch.rand(3, 16)
    want, got = theirs(images, noise=noise), ours.eval()(images, noise=noise, ratio=ratio)
    near(got['mask'], want.mask, 0.)
    assert torch.equal(got['restore'], want.ids_restore)
    near(got['latent'], theirs.vit(images, noise=noise).last_hidden_state)
    near(got['pixels'], want.logits)
    near(pixel_loss(got['pixels'], images, got['mask'], patch=6, normalise=normalise), want.loss)


# ---- dropping and putting back ----

@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 4), p=st.integers(1, 12), ratio=st.floats(0, .95), ties=st.booleans(), seed=st.integers(0, 99))
def test_dropping_is_its_slow_twin(b, p, ratio, ties, seed):
    noise = torch.rand(b, p, generator=torch.Generator().manual_seed(seed))
    if ties: noise = noise.mul(3).floor()
    if not int(p*(1 - ratio)):
        with expect_fail('leaves none'): drop_patches(noise, ratio)
        return
    fast, slow = drop_patches(noise, ratio), drop_patches_ref(noise, ratio)
    assert torch.equal(fast.ids, slow.ids) and torch.equal(fast.restore, slow.restore) and torch.equal(fast.mask, slow.mask)
    assert fast.mask.sum(1).tolist() == [p - int(p*(1 - ratio))]*b
    x, gap = torch.randn(b, fast.ids.shape[1], 3), torch.randn(3)
    back = put_back(x, gap, fast.restore)
    assert torch.equal(back, put_back_ref(x, gap, fast.restore))
    assert torch.equal(pick(back, fast.ids), x) and (back[fast.mask > 0] == gap).all()


@pytest.mark.parametrize('ratio', [-.1, 1., 1.5])
def test_shares_that_are_none(ratio):
    with expect_fail('the share of removed patches'): drop_patches(torch.rand(1, 4), ratio)


# ---- the model ----

@torch.no_grad()
def test_removed_patches_do_not_reach_the_encoder():
    model, images, noise = build(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    got = model(images, noise=noise)
    holes = got['mask'].reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) > 0
    other = model(torch.where(holes, torch.randn_like(images), images), noise=noise)
    near(other['latent'], got['latent'], 0.)
    near(other['pixels'], got['pixels'], 0.)


@torch.no_grad()
def test_without_noise_nothing_is_removed_from_the_trunk():
    model, images = build(), torch.randn(2, 3, 16, 16)
    tokens, kept = model.trunk.embed(images)
    assert kept is None and tokens.shape == (2, 17, 16)
    all_kept, order = model.trunk.embed(images, noise=torch.rand(2, 16), ratio=0.)
    near(put_back(all_kept[:, 1:], torch.zeros(16), order.restore), tokens[:, 1:], 0.)
    assert model(images)['mask'].sum(1).tolist() == [12., 12.]                           # drawn, three quarters


def test_tables_are_fixed_and_everything_else_learns():
    model, images = build(), torch.randn(2, 3, 16, 16)
    out = model(images)
    pixel_loss(out['pixels'], images, out['mask'], patch=4).backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {'trunk.positions', 'decoder.positions'}
    assert build(positions='learned').trunk.positions.requires_grad


def test_refusals():
    with expect_fail("'sincos' or 'learned'"): ViTTrunk(image_size=8, patch_size=4, width=8, layers=1, heads=1, positions='none')
    with expect_fail('does not divide'): ViTTrunk(image_size=9, patch_size=4, width=8, layers=1, heads=1)
    with expect_fail('(b, 3, 16, 16)'): build()(torch.randn(1, 3, 8, 8))


def test_oblong_pictures():
    trunk = ViTTrunk(image_size=(8, 16), patch_size=4, width=8, layers=1, heads=2)
    model = MAE(trunk, dim=8, layers=1, heads=2)
    out = model(torch.randn(1, 3, 8, 16), ratio=.5)
    assert out['pixels'].shape == (1, 8, 48) and out['latent'].shape == (1, 5, 8)


# ---- targets and loss ----

def test_targets_divide_by_n_minus_1():
    images = torch.randn(2, 3, 8, 8)
    target, raw = pixel_targets(images, 4), patchify(images, 4)
    near(target.var(-1, unbiased=True), torch.ones(2, 4), 1e-4)
    near(target.mean(-1), torch.zeros(2, 4))
    assert (target.var(-1, unbiased=False) - 1).abs().max() > .01
    assert torch.equal(pixel_targets(images, 4, normalise=False), raw)
    assert not pixel_targets(torch.full((1, 3, 4, 4), .3), 4).abs().max() > 1e-3         # plain: no division by zero


def test_loss_counts_removed_patches_of_the_whole_batch():
    images, pixels = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 48)
    mask = torch.tensor([[1., 0, 0, 0], [1, 1, 1, 0]])
    error = (pixels - pixel_targets(images, 4)).square().mean(-1)
    want = torch.cat([error[0, :1], error[1, :3]]).mean()                                # not the mean of two means
    near(pixel_loss(pixels, images, mask, patch=4), want)
    pixels[0, 1:] += 100.                                                                # seen patches are not asked for
    near(pixel_loss(pixels, images, mask, patch=4), want)
    assert pixel_loss(pixels, images, torch.zeros(2, 4), patch=4) == 0


def test_init_is_the_same_for_a_seed_and_leaves_the_tables_alone():
    a, b = init_mae(build(), 3), init_mae(build(layers=2), 3)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()) if x.ndim > 1)
    assert torch.equal(a.trunk.positions, build().trunk.positions)
    assert not a.trunk.encoder.blocks[0].attn.to_qkv.bias.any() and a.decoder.mask.any()
    assert isinstance(a.decoder, PixelDecoder)
