"The captioner: gates shut at first, padding that never matters, caches, layouts, official files, refusals."
from dataclasses import replace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from tensors import near
from vl_tutor.models.backbones import GPTConfig, ViTConfig
from vl_tutor.models.bridge import GatedCrossAttention, Mapper, MapperConfig, Resampler, ResamplerConfig
from vl_tutor.models.captioner import (SIZES, Captioner, CaptionerConfig, CrossConfig, caption_loss, captioner_keys, fitting_size, published_config)
from vl_tutor.models.parity import trace
from vl_tutor.primitives.attention import KVCache
from vl_tutor.primitives.notation import expect_fail

TINY = CaptionerConfig(ViTConfig(16, 8, 16, 1, 2, 24), GPTConfig(23, 24, 16, 2, 2, 32, bos_id=1, eos_id=2),
                       MapperConfig(hidden=12), ResamplerConfig(2, 2, 4, 3, 5, 1), CrossConfig(2, 4))
KINDS = dict(both=TINY, mapper=replace(TINY, resampler=None), resampler=replace(TINY, mapper=None), every=replace(TINY, cross=CrossConfig(2, 4, every=2)),
             transformer=replace(TINY, mapper=MapperConfig('transformer', 24, 2, 2)))


def build(config=TINY, seed=0, shaken=True):
    "A small captioner with random numbers everywhere, gates included"
    torch.manual_seed(seed)
    model = Captioner(config).eval()
    with torch.no_grad():
        for p in model.parameters() if shaken else (): p.add_(.3*torch.randn_like(p))
    return model


def batch(b=2, t=1, n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, 3, 16, 16, generator=gen), torch.randint(3, 23, (b, n), generator=gen)


# ---- gates ----

@torch.no_grad()
def test_at_step_0_the_logits_are_the_frozen_language_models():
    model = build(shaken=False)
    video, ids = batch()
    prefix, _ = model.bridge(*model.see(video))
    want = model.lm(torch.cat([prefix, model.lm.words(ids)], 1))[:, :-1]
    assert torch.equal(model(video, ids), want)


def test_at_step_0_nothing_behind_a_gate_has_a_gradient():
    model = build(shaken=False)
    model.loss(*batch()).backward()
    moves = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moves == {n for n, _ in model.named_parameters() if n.startswith('mapper.') or '.gate_' in n}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {n for n, _ in model.named_parameters() if n.startswith(('vision.', 'lm.'))}


def test_every_part_of_the_bridge_learns_once_a_gate_is_open():
    model = build()
    model.loss(*batch()).backward()
    still = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not still, still


# ---- padding and caches ----

lengths = st.lists(st.integers(1, 4), min_size=1, max_size=3)

@settings(max_examples=25, deadline=None)
@given(lengths=lengths, kind=st.sampled_from(list(KINDS)), extra=st.integers(0, 1), pad=st.integers(0, 2), seed=st.integers(0, 99))
def test_padding_never_matters(lengths, kind, extra, pad, seed):
    "A video alone, and the same beside longer ones with padded frames and words: the same logits"
    model, t, n = build(KINDS[kind]), max(lengths) + extra, 5
    video, ids = batch(len(lengths), t, n, seed)
    mask = torch.ones(len(lengths), n + pad, dtype=torch.bool)
    mask[:, n:] = False
    with torch.no_grad():
        together = model(video, nn.functional.pad(ids, (0, pad)), lengths=torch.tensor(lengths), mask=mask)[:, :n]
        cache = model.prompt(video, torch.tensor(lengths))
        steps = [model.step(ids[:, j:j + 1], cache) for j in range(n)]
        for i, real in enumerate(lengths):
            alone = model(video[i:i + 1, :real], ids[i:i + 1])
            near(together[i], alone[0], 3e-5)
            for j in range(n - 1): near(steps[j][i], alone[0, j + 1], 3e-5)


@torch.no_grad()
def test_as_published_padding_does_matter():
    model = build(replace(TINY, published=True))
    video, ids = batch(1, 3)
    padded, alone = model(video, ids, lengths=torch.tensor([2])), model(video[:, :2], ids, lengths=torch.tensor([2]))
    assert (padded - alone).abs().max() > .01


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_a_cached_step_is_an_uncached_one(kind):
    model = build(KINDS[kind])
    video, ids = batch(3, 2, 7)
    whole, cache = model(video, torch.cat([ids, ids[:, :1]], 1)), model.prompt(video)
    for j in range(7): near(model.step(ids[:, j:j + 1], cache), whole[:, j + 1])
    cache = model.prompt(video)
    near(model.step(ids[:, :4], cache), whole[:, 4])
    cache.reorder(torch.tensor([2, 0, 0]))
    near(model.step(ids[[2, 0, 0], 4:5], cache), whole[[2, 0, 0], 5])


@torch.no_grad()
def test_features_may_be_made_once():
    model = build()
    video, ids = batch(2, 2)
    features, _ = model.see(video)
    assert torch.equal(model(features, ids), model(video, ids))
    given = torch.tensor([1, 2])
    assert torch.equal(model(features, ids, lengths=given), model(video, ids, lengths=given))


def test_loss_counts_real_words_only():
    logits, ids = torch.randn(2, 4, 9), torch.randint(1, 9, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    rows = [nn.functional.cross_entropy(logits[i, j], ids[i, j]) for i, j in mask.nonzero().tolist()]
    near(caption_loss(logits, ids, mask), torch.stack(rows).mean())
    near(caption_loss(logits, ids*mask, published=True), torch.stack(rows).mean())
    exclaims = ids.clone()
    exclaims[0, 0] = 0                                           # a real word whose number is 0
    assert caption_loss(logits, exclaims, mask) != caption_loss(logits, exclaims*mask, mask, published=True)


# ---- pieces ----

@torch.no_grad()
def test_latents_do_not_care_for_the_order_of_patches_but_for_that_of_frames():
    torch.manual_seed(0)
    model, x = Resampler(8, ResamplerConfig(2, 2, 4, 3, 4)), torch.randn(2, 3, 5, 8)
    near(model(x[:, :, torch.randperm(5)]), model(x))
    assert (model(x[:, [1, 0, 2]]) - model(x)).abs().max() > .01


@torch.no_grad()
def test_open_gates_only():
    torch.manual_seed(0)
    block, y, seen = GatedCrossAttention(8, 6, CrossConfig(2, 4)), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    assert torch.equal(block(y, seen), y)
    block.gate_attn.fill_(.5)
    cache = KVCache()
    whole = block(y, seen, cache=cache)
    assert not torch.equal(whole, y)
    near(block(y[:, 2:3], cache=cache), whole[:, 2:3])


@pytest.mark.parametrize('heads', [2, 3])
@pytest.mark.parametrize('lengths', [(2, 4), (4, 4), (1, 3)])
def test_mapper_is_torchs_encoder_on_both_paths(heads, lengths):
    "The released transformer mapper IS torch's module: both of its paths, and the odd number of heads that has only one"
    torch.manual_seed(0)
    official = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, heads, 20, batch_first=True), 2).eval()
    ours = Mapper(12, MapperConfig('transformer', 20, 2, heads), zero_padding=False).eval()
    weights = {'_mapper.' + k: v for k, v in official.state_dict().items()}
    from vl_tutor.models.bridge import mapper_rules
    from vl_tutor.training.checkpoints import KeyMap
    ours.load_state_dict(KeyMap(mapper_rules(ours.config, '_mapper.', 'net.')).to_ours(weights, ours.state_dict()))
    x, mask = torch.randn(2, max(lengths), 3, 12), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    for grad in (True, False):
        with torch.set_grad_enabled(grad): near(ours(x, mask), official(x.mean(2), src_key_padding_mask=~mask))


# ---- layout ----

@pytest.mark.parametrize('t', [1, 3])
@torch.no_grad()
def test_layout_fits_the_tensors(t):
    model = build()
    video, ids = batch(1, t, 4)
    spans = model.layout(words=4, frames=t).streams
    covered = {kind: [(s.start, s.stop) for s in row] for kind, row in spans.items()}
    features, _ = model.see(video)
    with trace(model) as parts: model(video, ids)
    for kind, length in (('media', t*features.shape[2]), ('latents', parts['resampler'].shape[1]), ('text', parts['lm.decoder.blocks.0'].shape[1])):
        ends = covered[kind]
        assert ends[0][0] == 0 and ends[-1][1] == length and all(a[1] == b[0] for a, b in zip(ends, ends[1:])), kind
    assert all(s.stop - s.start == s.grid[0]*s.grid[1] for s in spans['media'] if s.grid)
    assert build(KINDS['mapper']).layout(words=0).streams['latents'] == []


# ---- official files ----

def test_published_counts():
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in _meta().items()}
    trainable = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in _meta().items()}
    assert counts['default'] == 250_922_264 and trainable['default'] == 39_026_456
    assert trainable['mapper_only'] == 787_712 and trainable['resampler_only'] == 38_238_744
    assert counts['transformer_mapper'] == 294_246_424 and trainable['transformer_mapper'] == 82_350_616
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in _meta()['default'].named_children()}
    assert parts == dict(vision=87_456_000, lm=124_439_808, mapper=787_712, resampler=9_890_304, gated=28_348_440)


def _meta():
    with torch.device('meta'): return {name: Captioner(config) for name, config in SIZES.items() if name != 'tiny'}


class DictConfig(dict):
    "A stand-in for OmegaConf's class: a file that holds one cannot be read with weights_only=True"


def official_file(tmp_path, model, **extra):
    keys = captioner_keys(model.config)
    path = tmp_path/'last.ckpt'
    torch.save(dict(epoch=3, model_cfg=DictConfig(enable_mapper=True), model_state_dict=keys.to_official(model.state_dict()) | extra,
                    optimizer_state_dict=dict(state={}, param_groups=[])), path)
    return path


def test_the_authors_file_comes_in(tmp_path):
    model = build(replace(TINY, published=True))
    layer = 'text_generator.lm.transformer.h.0.lm_block.attn.'
    path = official_file(tmp_path, model, **{layer + 'bias': torch.ones(1, 1, 24, 24), layer + 'masked_bias': torch.tensor(-1e4)})
    again = Captioner.from_official(path, model.config)
    with torch.no_grad(): assert torch.equal(again(*batch()), model(*batch()))
    assert not any(p.requires_grad for p in again.lm.parameters())


def test_a_wrong_file_is_refused_with_its_keys(tmp_path):
    model = build(replace(TINY, published=True))
    path = official_file(tmp_path, model, **{'resampler.extra': torch.zeros(1)})
    with expect_fail('resampler.extra'): Captioner.from_official(path, model.config)
    with expect_fail('mapper._mapper.0.weight'): Captioner.from_official(path, replace(model.config, mapper=None))
    with expect_fail('published size'): Captioner.from_official(path)
    torch.save(dict(a=torch.zeros(2)), tmp_path/'other.ckpt')
    with expect_fail('none of these'): Captioner.from_official(tmp_path/'other.ckpt')
    with expect_fail('wrong shape'): Captioner.from_official(path := official_file(tmp_path, model), replace(model.config, mapper=MapperConfig(hidden=13)))


def test_two_folders_of_transformers_become_a_captioner(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel
    CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)).save_pretrained(tmp_path/'eye')
    GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path/'pen')
    model = Captioner.from_towers(tmp_path/'eye', tmp_path/'pen', TINY).eval()
    with torch.no_grad(): assert model(*batch()).shape == (2, 6, 23)
    assert not any(p.requires_grad for p in [*model.vision.parameters(), *model.lm.parameters()])
    GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=24, n_embd=24, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path/'wide')
    with expect_fail('width'): Captioner.from_towers(tmp_path/'eye', tmp_path/'wide', TINY)


# ---- refusals ----

def test_wrong_use_is_refused():
    model = build()
    video, ids = batch(1, 6)
    with expect_fail('6 frames'): model(video, ids)
    with expect_fail('(b, t, 3, s, s)'): model(video[:, 0], ids)
    with expect_fail("not 'mean'"): Mapper(8, MapperConfig('mean'))
    with expect_fail('positions asked'): model(video[:, :1], torch.zeros(1, 24, dtype=torch.long))


def test_training_leaves_the_towers_in_evaluation_mode_unless_published():
    assert not build().train().lm.training and build(replace(TINY, published=True)).train().lm.training


def test_published_config_reads_the_three_files():
    cfg = dict(enable_mapper=True, enable_resampler_xattn=True, mapper=dict(mapper_type='mlp', mlp_dim=12, depth=8, heads=8),
               resampler=dict(depth=2, heads=2, dim_head=4, num_latents=3, num_time_embeds=5, ff_mult=1, activation='gelu'),
               text=dict(xattn=dict(heads=2, dim_head=4, ff_mult=1, activation='gelu', freq=1)))
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    text = dict(vocab_size=23, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_inner=32, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=1, eos_token_id=2)
    assert published_config(cfg, vision, text) == replace(TINY, published=True)
    shapes = {k: v.shape for k, v in captioner_keys(SIZES['tiny']).to_official(Captioner(SIZES['tiny']).state_dict()).items()}
    assert fitting_size(shapes) == replace(SIZES['tiny'], published=True)
