"Positions: closed forms, the slow twin, and transformers' own tables as oracle."
import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.positions import (LearnedPositions, TimePositions, resize_positions, similarity, sincos_1d, sincos_2d,
                                            sincos_2d_ref)

quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(n=st.integers(1, 20), half=st.integers(1, 12))
def test_sincos_1d_is_the_formula(n, half):
    table = sincos_1d(n, 2*half)
    for place in range(n):
        for i in range(half):
            angle = place/10_000**(i/half)
            assert table[place, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, half + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sincos_1d_takes_places_between_the_steps():
    torch.testing.assert_close(sincos_1d(torch.tensor([0., .5, 1.]), 8)[[0, 2]], sincos_1d(2, 8))
    assert sincos_1d(torch.tensor([.5]), 2)[0, 0].item() == pytest.approx(math.sin(.5))


@quick
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), quarter=st.integers(1, 6))
def test_fast_and_slow_grids_agree(rows, cols, quarter):
    torch.testing.assert_close(sincos_2d(rows, cols, 4*quarter), sincos_2d_ref(rows, cols, 4*quarter), rtol=0, atol=0)


@pytest.mark.parametrize('grid, dim', [(5, 16), (4, 24), (7, 20), (14, 64)])
def test_sincos_2d_is_mae(grid, dim):
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings
    theirs = ViTMAEEmbeddings(ViTMAEConfig(hidden_size=dim, image_size=4*grid, patch_size=4))
    theirs.initialize_weights()                                             # transformers 5.23 leaves zeros until this is called by hand
    table = theirs.position_embeddings
    assert table.abs().max() == 1
    torch.testing.assert_close(sincos_2d(grid, grid, dim, extra=1), table[0].detach(), rtol=0, atol=1e-6)


def test_row_first_and_scale():
    "Uni-Perceiver's table: [sin row, cos row, sin column, cos column], coordinates scaled"
    table = sincos_2d(3, 4, 8, first='row', scale=.5)
    row, col = 2, 3
    speeds = [1, .01]
    want = [f(x*s) for x in (row*.5, col*.5) for f in (math.sin, math.cos) for s in speeds]
    torch.testing.assert_close(table[row*4 + col], torch.tensor(want), atol=1e-6, rtol=0)


def test_dot_product_depends_on_distance_alone():
    table = sincos_1d(40, 32).double()
    dots = table @ table.T
    for k in range(8): torch.testing.assert_close(dots.diagonal(k), dots[0, k].expand(40 - k), atol=1e-5, rtol=0)


@pytest.mark.parametrize('call, words', [(lambda: sincos_1d(3, 5), 'dim=5'), (lambda: sincos_2d(2, 2, 6), 'dim=6'),
                                         (lambda: sincos_2d(2, 2, 8, first='diagonal'), 'diagonal')])
def test_wrong_use(call, words):
    with pytest.raises(ValueError, match=words): call()


# ---- learned rows and frames ----

def test_learned_rows_start_where_told_and_end_with_the_table():
    positions, tokens = LearnedPositions(6, 4), torch.randn(2, 6, 4)
    whole = positions(tokens)
    torch.testing.assert_close(whole, tokens + positions.weight)
    torch.testing.assert_close(positions(tokens[:, 4:], start=4), whole[:, 4:])
    with pytest.raises(ValueError, match='place 6 asked for, but the table has 6 rows'): positions(tokens, start=1)


@quick
@given(t=st.integers(1, 5), p=st.integers(1, 4), start=st.integers(0, 2), seed=st.integers(0, 99))
def test_frames_share_a_row_and_padding_gets_none(t, p, start, seed):
    dice = torch.Generator().manual_seed(seed)
    positions, clip = TimePositions(8, 3), torch.randn(2, t, p, 3, generator=dice)
    keep = torch.rand(2, t, generator=dice) < .5
    added = (positions(clip, keep=keep, start=start) - clip).detach()
    for b in range(2):
        for i in range(t):
            row = positions.weight[start + i, 0].detach()*keep[b, i]
            torch.testing.assert_close(added[b, i], row.expand(p, 3), atol=1e-6, rtol=0)


def test_more_frames_than_rows():
    with pytest.raises(ValueError, match='5 frames asked for, but the table has 4 rows'): TimePositions(4, 2)(torch.zeros(1, 5, 3, 2))


# ---- another grid ----

@pytest.mark.parametrize('old, new', [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((3, 3), (5, 5)), ((4, 6), (9, 2))])
@pytest.mark.parametrize('mode, antialias, align', [('bicubic', False, False), ('bicubic', True, False), ('bilinear', False, True)])
def test_resize_is_a_picture_resize_column_by_column(old, new, mode, antialias, align):
    table = torch.randn(2 + old[0]*old[1], 5)
    got = resize_positions(table, old, new, extra=2, mode=mode, antialias=antialias, align_corners=align)
    assert got.shape == (2 + new[0]*new[1], 5)
    torch.testing.assert_close(got[:2], table[:2], rtol=0, atol=0)
    for d in range(5):
        picture = table[2:, d].reshape(1, 1, *old)
        want = F.interpolate(picture, size=new, mode=mode, antialias=antialias, align_corners=align)
        torch.testing.assert_close(got[2:, d], want.flatten(), atol=1e-6, rtol=0)


def test_resize_as_transformers_does():
    from transformers import ViTMAEConfig, ViTMAEModel
    config = ViTMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, image_size=16, patch_size=4)
    inside = ViTMAEModel(config).embeddings
    table = torch.randn(1, 17, 8)
    inside.position_embeddings.data.copy_(table)
    want = inside.interpolate_pos_encoding(torch.zeros(1, 6*6 + 1, 8), 24, 24)
    torch.testing.assert_close(resize_positions(table, (4, 4), (6, 6)), want.detach(), atol=1e-5, rtol=0)


def test_resize_keeps_shape_type_and_the_same_grid():
    table = torch.randn(1, 17, 4, dtype=torch.float64)
    got = resize_positions(table, (4, 4), (2, 2))
    assert got.shape == (1, 5, 4) and got.dtype == table.dtype
    assert torch.equal(resize_positions(table, (4, 4), (4, 4)), table)
    with pytest.raises(ValueError, match='17 rows is not 1 extra'): resize_positions(table, (3, 3), (4, 4))


def test_similarity_is_the_cosine():
    table = torch.randn(6, 5)
    for i in range(6): torch.testing.assert_close(similarity(table)[i], F.cosine_similarity(table[i:i+1], table), atol=1e-6, rtol=0)
