"Patches: the slow twin, the round trip, and convolutions of torch, timm and transformers as oracle."
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.patches import PatchEmbed, fold_frames, grid_of, patchify, patchify_ref, unfold_frames, unpatchify

quick = settings(max_examples=40, deadline=None, derandomize=True)
sizes = dict(b=st.integers(1, 3), c=st.integers(1, 4), rows=st.integers(1, 4), cols=st.integers(1, 4), patch=st.integers(1, 4))


@quick
@given(**sizes)
def test_fast_and_slow_agree_and_come_back(b, c, rows, cols, patch):
    images = torch.rand(b, c, rows*patch, cols*patch)
    cut = patchify(images, patch)
    assert torch.equal(cut, patchify_ref(images, patch))
    assert torch.equal(unpatchify(cut, patch, grid=(rows, cols), channels=c), images)


@quick
@given(**sizes)
def test_every_pixel_is_where_the_spec_says(b, c, rows, cols, patch):
    "Square r·cols+k holds pixel (y, x) of colour j at (y·patch + x)·c + j"
    images = torch.arange(b*c*rows*patch*cols*patch, dtype=torch.float).reshape(b, c, rows*patch, cols*patch)
    cut = patchify(images, patch)
    r, k, y, x, j = rows - 1, cols//2, patch//2, patch - 1, c - 1
    assert cut[-1, r*cols + k, (y*patch + x)*c + j] == images[-1, j, r*patch + y, k*patch + x]


def test_patchify_is_vit_mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    config = ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, image_size=12, patch_size=4,
                          decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=4)
    mae, images = ViTMAEForPreTraining(config), torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(patchify(images, 4), mae.patchify(images), rtol=0, atol=0)
    torch.testing.assert_close(unpatchify(patchify(images, 4), 4), mae.unpatchify(patchify(images, 4)), rtol=0, atol=0)


@pytest.mark.parametrize('size, patch, channels, bias', [(12, 4, 3, True), ((8, 12), 4, 3, False), (6, 2, 1, True), (5, 5, 2, True)])
def test_embedding_is_a_matrix_on_the_squares(size, patch, channels, bias):
    embed = PatchEmbed(size, patch, 7, channels=channels, bias=bias).double()
    images = torch.rand(2, channels, *embed.image_size, dtype=torch.float64)
    matrix = rearrange(embed.proj.weight, 'd c y x -> d (y x c)')
    torch.testing.assert_close(embed(images), F.linear(patchify(images, patch), matrix, embed.proj.bias))
    assert embed(images).shape == (2, embed.n_patches, 7) and embed.n_patches == embed.grid[0]*embed.grid[1]
    assert (embed.proj.bias is not None) == bias


def test_embedding_is_timm():
    import timm
    theirs = timm.layers.PatchEmbed(img_size=16, patch_size=4, in_chans=3, embed_dim=8)
    ours = PatchEmbed(16, 4, 8)
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images))


def test_a_patch_moves_its_own_token_only():
    embed, image = PatchEmbed(8, 4, 5), torch.rand(1, 3, 8, 8)
    changed = image.clone()
    changed[..., 4:, :4] += 1                                               # the third square
    moved = (embed(changed) - embed(image)).abs().sum(-1)[0]
    assert moved[2] > 0 and torch.equal(moved[[0, 1, 3]], torch.zeros(3))


@quick
@given(b=st.integers(1, 3), t=st.integers(1, 4))
def test_frames_fold_and_unfold(b, t):
    video = torch.rand(b, t, 3, 2, 2)
    folded = fold_frames(video)
    assert folded.shape == (b*t, 3, 2, 2)
    for i in range(b*t): assert torch.equal(folded[i], video[i//t, i % t])
    assert torch.equal(unfold_frames(folded, t), video)


@pytest.mark.parametrize('call, words', [
    (lambda: patchify(torch.rand(1, 3, 5, 6), 3), '5×6 pixels'),
    (lambda: grid_of(4, 4, 0), 'squares of 0'),
    (lambda: PatchEmbed(7, 2, 4), '7×7 pixels'),
    (lambda: PatchEmbed(8, 2, 4)(torch.rand(1, 3, 8, 6)), r'\(1, 3, 8, 6\)'),
    (lambda: PatchEmbed(8, 2, 4)(torch.rand(1, 1, 8, 8)), r'\(b, 3, 8, 8\)'),
    (lambda: PatchEmbed(8, 2, 4)(torch.rand(3, 8, 8)), r'\(3, 8, 8\)'),
    (lambda: unpatchify(torch.rand(1, 6, 12), 2), '6 patches'),
    (lambda: unpatchify(torch.rand(1, 4, 13), 2), 'd=13'),
    (lambda: unfold_frames(torch.rand(5, 2), 2), 't=2'),
    (lambda: unfold_frames(torch.rand(5, 2), 0), 't=0'),
])
def test_wrong_use(call, words):
    with pytest.raises(ValueError, match=words): call()
