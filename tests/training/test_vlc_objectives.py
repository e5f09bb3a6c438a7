"VLC's objectives: losses by hand, the guard, the word lottery, two passes, soft answers, choices, precision."
import math
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from vl_tutor.models.vlc import VLC, Read, VLCConfig
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.primitives.patches import patchify
from vl_tutor.training.transport import word_patch_loss
from vl_tutor.training.vlc_objectives import (answering, fill_in, masked_pass, match_labels, matching_pass, mixed_up, paint, pair_statements, patch_noise,
                                              pretraining, rank_scores, ranking, word_game)
from vl_tutor.world.language import captions, world_tokenizer
from vl_tutor.world.scenes import World

WORDS = world_tokenizer()
TINY = VLCConfig(16, 4, 16, 2, 2, 24, WORDS.vocab_size, 24, 12, 1, 3, 3, ('mlm', 'itm', 'vqa', 'nlvr2', 'rank'), 5)


def build(seed=0, **kw):
    torch.manual_seed(seed)
    model = VLC(replace(TINY, **kw)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
    return model


def batch(b=4, seed=0):
    "Everything that any objective asks for, its own dice included"
    torch.manual_seed(seed)
    ids, mask = WORDS.encode(captions(World('pair').scenes(torch.arange(b))))
    masked, labels = word_game(WORDS, ids, rate=.3)
    rows = (torch.arange(b)[:, None] + torch.arange(3)) % b                     # the true one first
    return dict(image=torch.randn(b, 3, 16, 16), false_image=torch.randn(b, 3, 16, 16), ids=ids, mask=mask, masked_ids=masked, labels=labels,
                noise=torch.rand(b, 16), match_noise=torch.rand(b, 16), match_order=torch.randperm(b), targets=torch.rand(b, 5),
                pair=torch.randn(b, 2, 3, 16, 16), label=torch.arange(b) % 2, choice_ids=ids[rows], choice_mask=mask[rows])


# ---- words ----

def test_fill_in_is_the_mean_surprise_and_silent_without_a_question():
    model, data = build(), batch()
    read = model(data['image'], data['masked_ids'], data['mask'])
    logits = model.heads['mlm'](read.text)
    assert torch.allclose(fill_in(model, read, data['labels']), F.cross_entropy(logits.flatten(0, 1), data['labels'].flatten(), ignore_index=-100))
    quiet = fill_in(model, read, torch.full_like(data['labels'], -100))
    quiet.backward()
    assert quiet == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([.15, .3, .6]))
def test_the_repaired_lottery_asks_every_caption_and_restores_the_text(seed, rate):
    gen = torch.Generator().manual_seed(seed)
    ids, mask = WORDS.encode(captions(World('pair').scenes(torch.arange(16))))
    ids = F.pad(ids, (0, 40 - ids.shape[1]), value=WORDS.pad_id)
    for published in (False, True):
        masked, labels = word_game(WORDS, ids, rate=rate, published=published, generator=gen)
        asked = labels >= 0
        assert torch.equal(torch.where(asked, labels, masked), ids)
        assert not asked[~WORDS.maskable(ids)].any()
        if not published: assert asked.any(1).all()


def test_the_published_lottery_leaves_one_in_seven_captions_of_ten_words_unasked():
    ids = torch.full((2000, 40), WORDS.pad_id)
    ids[:, 0], ids[:, 1:11], ids[:, 11] = WORDS.bos_id, 9, WORDS.eos_id
    labels = word_game(WORDS, ids, published=True, generator=torch.Generator().manual_seed(0))[1]
    assert abs((labels < 0).all(1).float().mean() - math.comb(28, 6)/math.comb(38, 6)) < .025
    assert abs((labels >= 0).float().sum()/20000 - 6/38) < .01                  # words are still asked at 15.8 %


# ---- pixels ----

def test_paint_is_the_mean_over_removed_patches_of_the_batch():
    model, data = build(), batch()
    read = model(data['image'], data['ids'], data['mask'], noise=data['noise'], ratio=.6)
    target = patchify(data['image'], 4)
    target = (target - target.mean(-1, keepdim=True))/(target.var(-1, keepdim=True) + 1e-6).sqrt()
    gone = read.kept.mask.bool()
    assert torch.allclose(paint(model, read, data['image']), (model.pixels(read) - target)[gone].square().mean(), atol=1e-6)


# ---- pairs ----

@given(st.integers(1, 33))
def test_the_odd_pair_out_is_false(b):
    labels = match_labels(b)
    assert labels.sum() == b//2 and labels.dtype == torch.long and len(labels) == b
    order = torch.randperm(b)
    assert torch.equal(match_labels(b, order), (order < b//2).long())


def test_labels_say_which_picture_it_is():
    data = batch()
    mixed = mixed_up(data, torch.tensor([1, 0, 0, 1]))
    assert torch.equal(mixed[[0, 3]], data['image'][[0, 3]]) and torch.equal(mixed[[1, 2]], data['false_image'][[1, 2]])


def test_matching_spelled_out():
    model, data = build(), batch()
    losses = matching_pass(model, data)
    labels = match_labels(4, data['match_order'])
    read = model(mixed_up(data, labels), data['ids'], data['mask'], noise=data['match_noise'], ratio=.6)
    assert torch.allclose(losses['itm'], F.cross_entropy(model.heads['itm'](read.pooled), labels))
    assert torch.allclose(losses['wpa'], word_patch_loss(read.text, read.image, data['mask'], labels))
    assert torch.equal(matching_pass(model, data, wpa=True)['wpa'], losses['wpa']) and list(matching_pass(model, data, wpa=False)) == ['itm']
    assert torch.allclose(matching_pass(model, data, wpa=.5)['wpa'], 5*losses['wpa'])


# ---- the step ----

def test_a_step_is_two_passes_with_dice_of_their_own():
    model, data = build(), batch()
    losses = pretraining(model, data)
    assert list(losses) == ['mlm', 'mim', 'itm', 'wpa'] and all(v.ndim == 0 and v.isfinite() for v in losses.values())
    first = masked_pass(model, data)
    assert list(first) == ['mlm', 'mim'] and all(torch.equal(first[k], losses[k]) for k in first)
    other = pretraining(model, data | dict(match_noise=torch.rand(4, 16)))      # only the second pass changes
    assert torch.equal(other['mim'], losses['mim']) and other['itm'] != losses['itm']
    other = pretraining(model, data | dict(masked_ids=data['ids']))             # only the first
    assert torch.equal(other['itm'], losses['itm']) and other['mlm'] != losses['mlm']


def test_without_holes_or_decoder_there_is_nothing_to_paint():
    data = batch()
    assert list(pretraining(build(), data, ratio=0., wpa=0.)) == ['mlm', 'itm']
    assert list(masked_pass(build(decoder_layers=0), data)) == ['mlm']


def test_noise_is_the_batchs_own_or_drawn():
    model, data = build(), batch()
    assert patch_noise(model, data) is data['noise'] and patch_noise(model, data, 'match_noise') is data['match_noise']
    drawn = patch_noise(model, dict(ids=data['ids']))
    assert drawn.shape == (4, 16) and 0 <= drawn.min() and drawn.max() < 1


def test_a_batch_without_a_question_still_trains_the_rest():
    model, data = build(), batch()
    losses = pretraining(model, data | dict(labels=torch.full_like(data['labels'], -100)))
    assert losses['mlm'] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and model.trunk.cls.grad.any()


# ---- tasks ----

def test_answers_are_soft_and_summed():
    model, data = build(), batch()
    p, t = model.answer(data['image'], data['ids'], data['mask']).sigmoid(), data['targets']
    by_hand = -(t*p.log() + (1 - t)*(1 - p).log()).sum(1).mean()
    assert torch.allclose(answering(model, data)['vqa'], by_hand, atol=1e-5)


def test_pairs_are_true_or_false():
    model, data = build(), batch()
    logits = model.judge(data['pair'], data['ids'], data['mask']).log_softmax(1)
    assert torch.allclose(pair_statements(model, data)['nlvr2'], -logits[range(4), data['label']].mean())


@torch.no_grad()
def test_rank_scores_are_those_of_single_pairs_and_the_first_is_right():
    model, data = build(), batch()
    scores = rank_scores(model, data['image'], data['choice_ids'], data['choice_mask'])
    for i in range(4):
        for j in range(3):
            alone = model.rank(data['image'][i:i + 1], data['choice_ids'][i, j:j + 1], data['choice_mask'][i, j:j + 1])
            assert torch.allclose(alone[0], scores[i, j], atol=1e-5)
    assert torch.equal(rank_scores(model, model.see(data['image']), data['choice_ids'], data['choice_mask']), scores)
    assert torch.allclose(ranking(model, data)['rank'], -scores.log_softmax(1)[:, 0].mean())


@pytest.mark.parametrize('objective', [pretraining, answering, pair_statements, ranking])
def test_bf16_gives_finite_losses_and_gradients(objective):
    model, data = build(), batch()
    with torch.autocast('cpu', torch.bfloat16): losses = objective(model, data)
    full = objective(model, data)
    assert all(abs(losses[k].item() - full[k].item()) < .1 for k in full)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_missing_head_is_named():
    bare, data = build(tasks=('mlm',), modalities=2), batch()
    for objective, said in ((pretraining, "no 'itm' head"), (answering, "no 'vqa' head"), (ranking, "no 'rank' head"), (pair_statements, 'three modality rows')):
        with expect_fail(said): objective(bare, data)
    guesses = SimpleNamespace(head=lambda name: lambda x: x)
    with expect_fail('need labels'): fill_in(guesses, Read(torch.zeros(2, 3, 4), None, None), torch.zeros(2, 2, dtype=torch.long))
