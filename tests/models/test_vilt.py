"ViLT as a VLC: transformers' classes with copied weights, ragged pictures alone and together, the guessed padding, refusals."
import json
import pytest
import torch
from tensors import near, shake
from vl_tutor.data.transforms import padded_pictures
from vl_tutor.models.vilt import (batched, choose_patches, choose_row, grids_of, load_vilt, published_patches, ragged_positions, ragged_positions_ref, real_patches,
                                  see_ragged, to_places)
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.primitives.notation import expect_fail

SIZES = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, vocab_size=30, image_size=12, patch_size=4, max_position_embeddings=9)
SHAPES = [(8, 12), (16, 4), (12, 12), (4, 4)]


def inputs():
    gen = torch.Generator().manual_seed(2)
    pictures = [torch.randn(3, h, w, generator=gen) for h, w in SHAPES]
    mask = torch.arange(7) < torch.tensor([[7], [5], [3], [6]])
    return pictures, torch.randint(3, 30, (4, 7), generator=gen), mask


def build(**kw):
    torch.manual_seed(0)
    return shake(VLC(VLCConfig(12, 4, 12, 2, 3, 20, 30, 9, decoder_layers=0, tasks=('itm',), **{'positions': 'learned', **kw})))


def saved(cls, folder, **more):
    import transformers
    torch.manual_seed(0)
    theirs = shake(getattr(transformers, cls)(transformers.ViltConfig(**SIZES, **more)))
    for name, layer in theirs.named_modules():                                  # the authors' in the trunk; transformers writes 1e-12 everywhere
        if isinstance(layer, torch.nn.LayerNorm) and not ('text_embeddings' in name or 'mlm_score' in name or 'classifier' in name): layer.eps = 1e-6
    theirs.save_pretrained(folder)
    return theirs, load_vilt(folder)


def theirs_input(pictures):
    valid = real_patches(SHAPES, 4)
    return dict(pixel_values=padded_pictures(pictures), pixel_mask=valid.repeat_interleave(4, 1).repeat_interleave(4, 2).long())


@torch.no_grad()
def test_vilt_is_transformers_viltmodel(tmp_path, monkeypatch):
    theirs, ours = saved('ViltModel', tmp_path)
    pictures, ids, mask = inputs()
    monkeypatch.setattr(torch, 'multinomial', lambda weights, n, replacement=False: torch.arange(n) % len(weights))      # their dice: reading order
    want = theirs(ids, mask.long(), output_hidden_states=True, **theirs_input(pictures))
    read = ours(see_ragged(ours, pictures), ids, mask)
    keep = torch.cat([mask, see_ragged(ours, pictures).keep], 1)
    for got, there in ((torch.cat([read.text, read.image], 1), want.last_hidden_state), (read.pooled, want.pooler_output)):
        near(got[keep] if got.ndim == 3 else got, there[keep] if there.ndim == 3 else there)
    assert ours.config.tasks == () and ours.decoder is None


@pytest.mark.parametrize('cls, head', [('ViltForMaskedLM', 'mlm'), ('ViltForQuestionAnswering', 'vqa'), ('ViltForImageAndTextRetrieval', 'rank')])
@torch.no_grad()
def test_heads_of_transformers(cls, head, tmp_path):
    theirs, ours = saved(cls, tmp_path, **(dict(num_labels=6) if head == 'vqa' else {}))
    pictures, ids, mask = inputs()
    want = theirs(input_ids=ids, attention_mask=mask.long(), **theirs_input(pictures)).logits
    read = ours(see_ragged(ours, pictures), ids, mask)
    assert ours.config.tasks == (head,)
    near(ours.head(head)(read.text if head == 'mlm' else read.pooled), want, 2e-5)


@torch.no_grad()
def test_pairs_of_transformers(tmp_path):
    theirs, ours = saved('ViltForImagesAndTextClassification', tmp_path, num_images=2, num_labels=2, modality_type_vocab_size=3)
    pictures, ids, mask = inputs()
    batch = theirs_input(pictures)
    pair = {k: torch.stack([v, v.roll(1, 0)], 1) for k, v in batch.items()}
    want = theirs(input_ids=ids, attention_mask=mask.long(), **pair).logits
    seen = see_ragged(ours, pictures)
    pooled = [ours(seen[rows], ids, mask, row=i + 1).pooled for i, rows in enumerate((torch.arange(4), torch.tensor([3, 0, 1, 2])))]
    near(ours.head('nlvr2')(torch.cat(pooled, 1)), want, 2e-5)


def test_another_model_is_refused(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='clip')))
    with expect_fail("is a 'clip', not a ViLT"): load_vilt(tmp_path)


# ---- ragged pictures ----

@pytest.mark.parametrize('positions', ['learned', 'sincos'])
@torch.no_grad()
def test_company_never_matters(positions):
    model, (pictures, ids, mask) = build(positions=positions), inputs()
    together = model(see_ragged(model, pictures), ids, mask)
    for i, picture in enumerate(pictures):
        n = int(mask[i].sum())
        alone = model(see_ragged(model, [picture]), ids[i:i + 1, :n])
        near(together.text[i, :n], alone.text[0])
        near(together.image[i, :alone.image.shape[1]], alone.image[0])


@torch.no_grad()
def test_order_and_padding_never_matter():
    model, (pictures, ids, mask) = build(), inputs()
    valid, images = real_patches(SHAPES, 4), padded_pictures(pictures)
    counts, k = valid.flatten(1).sum(1).tolist(), 9
    picks = [torch.randperm(n)[:k] if n >= k else torch.randint(valid[0].numel() - n, (k - n,)) for n in counts]
    noisy = images + 100*(~valid).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    want = model(see_ragged(model, images, valid), ids, mask).pooled
    near(model(see_ragged(model, noisy, valid, picks=picks), ids, mask).pooled, want)


@torch.no_grad()
def test_squares_of_the_trained_size_are_read_as_ever():
    model, images = build(), torch.randn(2, 3, 12, 12)
    assert torch.equal(see_ragged(model, images).tokens, model.see(images).tokens)
    assert torch.equal(see_ragged(model, list(images)).tokens, model.see(images).tokens)


def test_tables_stretch_as_patch_by_patch_and_pass_the_gradient_on():
    valid = real_patches([(3, 5), (6, 1), (1, 1), (4, 4), (3, 5)], 1)
    table = torch.randn(12, 5, requires_grad=True)
    fast = ragged_positions(table, (3, 4), valid)
    near(fast, ragged_positions_ref(table.detach(), (3, 4), valid))
    assert not fast[~valid.flatten(1)].any()
    fast.sum().backward()
    assert table.grad.abs().sum(1).gt(0).sum() > 6


def test_limits_draw_real_patches_without_repetition():
    valid = real_patches([(3, 4), (2, 2), (4, 4)], 1)
    cut = choose_patches(valid, 6, generator=torch.Generator().manual_seed(0))
    again = choose_patches(valid, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cut.ids, again.ids) and cut.ids.shape == (3, 6) and cut.keep.sum(1).tolist() == [6, 4, 6]
    for ids, keep, real in zip(cut.ids, cut.keep, valid.flatten(1)):
        assert real[ids[keep]].all() and len(set(ids[keep].tolist())) == int(keep.sum())
    drawn = {tuple(choose_row(valid[2].flatten(), 6).tolist()) for _ in range(20)}
    assert len(drawn) > 5
    assert choose_patches(valid, -1).ids.shape == choose_patches(valid).ids.shape == (3, 16)


def test_numbers_find_their_places():
    valid = real_patches([(3, 4), (2, 2)], 1)
    cut = choose_patches(valid)
    grid = to_places(cut.ids.float(), cut)
    assert torch.equal(grid.isnan(), ~valid)
    assert torch.equal(grid[0, :, :4], torch.arange(12.).reshape(3, 4))
    assert torch.equal(cut.places[0, 5], torch.tensor([1, 1]))


# ---- padding: told or guessed ----

def test_guessed_padding_agrees_on_noise_and_fails_on_zeros():
    pictures, _, _ = inputs()
    images = padded_pictures(pictures)
    assert torch.equal(published_patches(images, 4), real_patches(SHAPES, 4))
    images[0, :, 4, 4] = 0.                                                     # one pixel, and a patch is lost
    assert (published_patches(images, 4) != real_patches(SHAPES, 4)).sum() == 1
    model = build()
    assert see_ragged(model, images, real_patches(SHAPES, 4)).keep[0].sum() == 7 and see_ragged(model, images, published_patches(images, 4)).keep[0].sum() == 6
    with expect_fail('picture 3 of the batch'): grids_of(published_patches(torch.cat([images[:3], 0*images[3:]]), 4))


def test_refusals():
    model, (pictures, _, _) = build(), inputs()
    with expect_fail('7×12'): see_ragged(model, [torch.randn(3, 7, 12)])
    with expect_fail('a mask of (1, 2, 2)'): see_ragged(model, torch.randn(1, 3, 12, 12), torch.ones(1, 2, 2, dtype=torch.bool))
    images, valid = batched(pictures, None, 4)
    assert images.shape == (4, 3, 16, 12) and torch.equal(valid, real_patches(SHAPES, 4))
    assert batched(images, None, 4)[1].all()                                    # a tensor without a mask is all picture


@torch.no_grad()
def test_the_fixtures_padding_is_what_its_sizes_say():
    from pathlib import Path
    from vl_tutor.models.parity import read_golden
    config, _, io = read_golden(Path(__file__).resolve().parents[1]/'golden'/'vlc'/'vilt')
    c, images = config['config'], io['in/image']
    guessed = published_patches(images, c['patch_size'])
    assert torch.equal(guessed, real_patches(c['hw'], c['patch_size'], grid=guessed.shape[1:]))
