"""Nothing is tied to the sizes of the stored fixtures: the published arithmetic, proved on them, makes fixtures of other sizes and options.

Also: the parity tests can fail. A folder nobody knows, a tensor left out, a number changed: each is noticed and named."""
import json
from pathlib import Path
import pytest
import torch
from safetensors.torch import save_file
import parity_captioner as ours
import parity_official as theirs
from parity_golden import CHECKERS, compare, fixtures, manifests
from vl_tutor.models.captioner import Captioner, captioner_keys, published_config
from vl_tutor.models.parity import read_golden

GOLDEN = Path(__file__).resolve().parents[1]/'golden'/'captioner'


def judge(fixture, ours_, io): return compare(ours_, io, ours.atol(fixture), ours.rtol(fixture))
def with_cross(config): return dict(config, cross=(config['model_cfg'].get('text') or {}).get('xattn'))


# ---- the stand-in is faithful ----

@pytest.mark.parametrize('name', ['model_full_image', 'model_full_video', 'model_mapper_only', 'model_resampler_only'])
def test_stand_in_agrees_with_the_stored_models(name):
    config, weights, io = read_golden(GOLDEN/name)
    found = theirs.whole_model(weights, io, with_cross(config))
    judge(name, {k: v for k, v in found.items() if k in io}, io)


def test_stand_in_agrees_with_the_stored_training():
    config, weights, io = read_golden(GOLDEN/'train_steps')
    judge('train_steps', theirs.train_steps(weights, io, with_cross(config)), io)


# ---- fixtures of other sizes ----

def make_config(seed: int) -> dict:
    "Random sizes and options, those of the stored fixtures avoided"
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[torch.randint(len(options), (), generator=g)]
    heads, per = pick(1, 2, 5), pick(4, 6)
    d = heads*per*2
    vision = dict(hidden_size=d, intermediate_size=pick(18, 30), num_hidden_layers=pick(0, 1, 3), num_attention_heads=heads, image_size=pick(12, 18), patch_size=6,
                  hidden_act='quick_gelu', layer_norm_eps=1e-5, attention_dropout=0., num_channels=3, projection_dim=None)
    text = dict(vocab_size=pick(29, 43), n_positions=20, n_embd=d, n_layer=pick(1, 4, 5), n_head=pick(1, 2), n_inner=pick(None, 26), activation_function='gelu_new',
                resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., layer_norm_epsilon=1e-5, bos_token_id=2, eos_token_id=1)
    act, kind = pick('gelu', 'relu', 'sqrelu'), pick('mlp', 'transformer')
    resampler = dict(depth=pick(1, 3), dim_head=pick(3, 5), heads=pick(1, 3), num_latents=pick(1, 4), num_time_embeds=pick(4, 9), ff_mult=pick(1, 3), activation=act)
    cross = dict(dim_head=pick(3, 7), heads=pick(1, 3), ff_mult=pick(1, 2), activation=pick('gelu', 'relu', 'sqrelu'), freq=pick(1, 2, 3))
    on = pick((True, True), (True, True), (True, False), (False, True))
    model = dict(enable_mapper=on[0], enable_resampler_xattn=on[1], mapper=dict(mapper_type=kind, depth=pick(1, 3), heads=pick(1, 2), dim_feedforward=22, mlp_dim=11),
                 resampler=resampler, text=dict(xattn=cross, trainable=False))
    return dict(model_cfg=model, hf_vision_config=vision, hf_text_config=text, cross=cross)


def make_weights(config: dict, seed: int) -> dict:
    "Random official tensors, every one of them; the names of the trained ones go into the configuration"
    torch.manual_seed(seed)
    c = published_config(config['model_cfg'], config['hf_vision_config'], config['hf_text_config'])
    model = Captioner(c)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.3*torch.randn_like(p) + (p.ndim == 1)*.4)
    keys = captioner_keys(c)
    official = keys.to_official(model.state_dict())
    trained = [n for n in official if n.startswith(('mapper.', 'resampler.')) or '.xattn_block.' in n]
    config['trainable_parameters'] = trained
    return {k: v.detach().clone() for k, v in official.items()}


def make_inputs(config: dict, seed: int, steps=()) -> dict:
    g = torch.Generator().manual_seed(seed)
    v, s, b, t, n = config['hf_text_config']['vocab_size'], config['hf_vision_config']['image_size'], 3, 3, 6
    five = (5,) if steps else ()
    length = torch.randint(1, t + 1, (*steps, b), generator=g)
    length[..., 0] = t                                                    # a batch is as long as its longest video
    mask = (torch.arange(n) < torch.randint(2, n + 1, (*steps, b, *five, 1), generator=g)).long()
    ids = torch.randint(v, (*steps, b, *five, n), generator=g)*mask
    ids[..., 0] = 2
    out = {'in.video': torch.randn(*steps, b, t, 3, s, s, generator=g), 'in.video_length': length, 'in.tokens': ids, 'in.tokens_mask': mask}
    return out | ({'in.caption_pick': torch.randint(5, (*steps, b), generator=g)} if steps else {})


@pytest.mark.parametrize('seed', range(12))
def test_whole_models_of_other_sizes(seed):
    config = make_config(seed)
    weights, io = make_weights(config, seed), make_inputs(config, seed)
    io |= theirs.whole_model(weights, io, config)
    # float noise grows with these random weights: the stored fixtures are milder
    found = ours.whole_model(config, weights, io)
    loose = lambda name: 10*ours.atol('model')(name)
    assert compare(found, io, loose, lambda name: 1e-3 if name == 'out.grad_norms' else 1e-5) == len(io) - 4


@pytest.mark.parametrize('optimizer', ['adam', 'adamw'])
@pytest.mark.parametrize('scheduler', [dict(name='Linear', warmup_steps=2, warmup_ratio=None), dict(name='CosineAnnealing', warmup_steps=None, warmup_ratio=.5),
                                       dict(name='CosineAnnealing', warmup_steps=1, warmup_ratio=None), dict(name='Linear', warmup_steps=None, warmup_ratio=.3)])
def test_training_with_other_options(optimizer, scheduler):
    config = make_config(3)
    config['model_cfg'] |= dict(enable_mapper=True, enable_resampler_xattn=True)
    config['model_cfg']['mapper']['mapper_type'] = 'mlp'                  # torch's encoder drops out while training
    config['model_cfg']['resampler']['num_latents'] = 4                   # one latent alone leaves its queries no gradient but noise
    config['optimizer_cfg'] = dict(name=optimizer, lr=.004, betas=[.8, .95], weight_decay=.07, scheduler=scheduler)
    weights, io = make_weights(config, 5), make_inputs(config, 5, steps=(5,))
    io |= theirs.train_steps(weights, io, config)
    assert judge('train_steps', ours.train_steps(config, weights, io), io) > 20


def piece(seed):
    g = torch.Generator().manual_seed(seed)
    return g, lambda *options: options[torch.randint(len(options), (), generator=g)], lambda *shape: torch.randn(*shape, generator=g)


def shaken(module, rules, prefix=''):
    from vl_tutor.training.checkpoints import KeyMap
    with torch.no_grad():
        for p in module.parameters(): p.copy_(.4*torch.randn_like(p) + (p.ndim == 1)*.5)
    return {prefix + k: v for k, v in KeyMap(rules).to_official(module.state_dict()).items()}


@pytest.mark.parametrize('seed', range(6))
def test_resamplers_of_other_sizes(seed):
    from vl_tutor.models.bridge import Resampler, ResamplerConfig, resampler_rules
    g, pick, draw = piece(seed)
    a = dict(dim=pick(7, 12), depth=pick(1, 2, 4), dim_head=pick(3, 5), heads=pick(1, 3), num_latents=pick(1, 5), num_time_embeds=6, ff_mult=pick(1, 2), activation=pick('gelu', 'relu', 'sqrelu'))
    sizes = ResamplerConfig(a['depth'], a['heads'], a['dim_head'], a['num_latents'], a['num_time_embeds'], a['ff_mult'], a['activation'])
    weights = shaken(Resampler(a['dim'], sizes), resampler_rules('', ''))
    x, mask, steps = draw(2, 4, 3, a['dim']), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), {}
    io = {'in.video': x, 'in.video_mask': mask, 'in.image': x[:, :1], 'in.image_mask': mask[:, :1]}
    io['out.video_masked'] = theirs.resampler(weights, x, mask, a, '', steps)
    io |= {f'mid.video_masked.{k}': v for k, v in steps.items()}
    io |= {'out.video_unmasked': theirs.resampler(weights, x, None, a, ''), 'out.image': theirs.resampler(weights, x[:, :1], mask[:, :1], a, '')}
    assert judge('resampler', CHECKERS['captioner/resampler'](dict(args=a), weights, io), io) == 3 + 2*a['depth']


@pytest.mark.parametrize('seed', range(6))
def test_gated_blocks_of_other_sizes(seed):
    from vl_tutor.models.bridge import GatedCrossAttention, gated_rules
    g, pick, draw = piece(seed)
    a = dict(dim=pick(8, 10), dim_visual=pick(5, 9), dim_head=pick(3, 4), heads=pick(1, 3), ff_mult=pick(1, 3), act=pick('gelu', 'relu', 'sqrelu'), n_visual=4)
    weights = shaken(GatedCrossAttention(a['dim'], a['dim_visual'], ours.cross_config(a)), gated_rules('', ''))
    io = {'in.y': draw(2, 5, a['dim']), 'in.visual': draw(2, 1, 4, a['dim_visual']), 'in.y_step': draw(2, 1, a['dim']), 'in.visual_multi': draw(2, 2, 4, a['dim_visual'])}
    steps, run = {}, lambda y, seen, steps=None: theirs.gated(weights, y, seen.flatten(1, 2), a, '', steps)
    io['out.y'] = run(io['in.y'], io['in.visual'], steps)
    io |= {'mid.attn_out': steps['attn_out'], 'mid.ffw_out': steps['ffw_out'], 'out.k': steps['k'], 'out.v': steps['v'],
           'out.y_step': run(io['in.y_step'], io['in.visual']), 'out.y_multi': run(io['in.y'], io['in.visual_multi'])}
    assert judge('gated_xattn', CHECKERS['captioner/gated_xattn'](dict(args=a), weights, io), io) == 7


@pytest.mark.parametrize('kind', ['mlp', 'transformer'])
@pytest.mark.parametrize('heads', [1, 2, 3])
def test_mappers_of_other_sizes(kind, heads):
    from vl_tutor.models.bridge import Mapper, MapperConfig, mapper_rules
    g, pick, draw = piece(heads)
    a = dict(embedding_dim=12, mapper_type=kind, depth=3, heads=heads, dim_feedforward=10, mlp_dim=7)
    sizes = MapperConfig(kind, 7 if kind == 'mlp' else 10, 3, heads)
    weights = shaken(Mapper(12, sizes), mapper_rules(sizes, '_mapper.', 'net.'))
    io = {'in.x': draw(3, 5, 2, 12), 'in.mask': torch.arange(5) < torch.tensor([[5], [1], [3]])}
    with torch.no_grad(): io['out.mapped'] = theirs.mapper(weights, io['in.x'], io['in.mask'], a, '_mapper.')
    if kind == 'transformer': io['out.mapped_slowpath'] = theirs.mapper(weights, io['in.x'], io['in.mask'], a, '_mapper.', fast=False)
    assert judge(f'mapper_{kind}', CHECKERS[f'captioner/mapper_{kind}'](dict(args=a), weights, io), io) == 1 + (kind == 'transformer')


# ---- the tests can fail ----

def test_a_folder_nobody_knows_is_found(tmp_path):
    for name in ('captioner/resampler', 'captioner/hologram', 'newsystem/encoder'): (tmp_path/name).mkdir(parents=True)
    (tmp_path/'newsystem'/'manifest_base.json').write_text('{}')
    assert fixtures(tmp_path) == ['captioner/hologram', 'captioner/resampler', 'newsystem/encoder']
    assert manifests(tmp_path) == ['newsystem/manifest_base.json']
    assert 'captioner/hologram' not in CHECKERS and 'newsystem/encoder' not in CHECKERS


def test_every_checker_has_its_fixture_and_every_fixture_its_checker():
    assert set(CHECKERS) == set(fixtures(GOLDEN.parent))


@pytest.mark.parametrize('name', sorted(n for n in CHECKERS if n.startswith('captioner/') and n != 'captioner/train_steps'))
def test_a_changed_number_is_named(name):
    config, weights, io = read_golden(GOLDEN.parent/name)
    fixture = name.split('/')[1]
    found = CHECKERS[name](config, weights, io)
    changed = sorted(k for k in io if not k.startswith('in.'))
    for key in changed[::max(1, len(changed)//4)]:
        wrong = io[key].clone()
        flat = wrong.view(-1)
        flat[len(flat)//2] = ~flat[len(flat)//2] if wrong.dtype == torch.bool else flat[len(flat)//2] + 1
        with pytest.raises(AssertionError, match=key.replace('.', r'\.')): judge(fixture, found, io | {key: wrong})
    with pytest.raises(AssertionError, match='nothing'): judge(fixture, {k: v for k, v in found.items() if k != changed[0]}, io)
    with pytest.raises(AssertionError, match='out.more'): judge(fixture, found, io | {'out.more': torch.zeros(1)})


def test_a_wrong_weight_is_traced_to_its_layer():
    config, weights, io = read_golden(GOLDEN/'model_full_image')
    last = config['hf_text_config']['n_layer'] - 1
    key = f'text_generator.lm.transformer.h.{last}.lm_block.mlp.c_fc.bias'
    found = ours.whole_model(config, weights | {key: weights[key] + .1}, io)
    with pytest.raises(AssertionError, match=rf'mid\.block{last} differs'): judge('model_full_image', found, io)


def test_a_fixture_from_disk(tmp_path):
    config, weights, io = read_golden(GOLDEN/'vision_encoder')
    (tmp_path/'config.json').write_text(json.dumps(config))
    for name, tensors in (('weights', weights), ('io', io)): save_file(tensors, tmp_path/f'{name}.safetensors')
    assert judge('vision_encoder', CHECKERS['captioner/vision_encoder'](*read_golden(tmp_path)), io) == 2
