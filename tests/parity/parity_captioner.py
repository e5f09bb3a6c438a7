"How each captioner fixture is built from its own config.json; every function returns its results in forward order."
import numpy as np
import torch
from fastai.data.core import DataLoaders
from torch import Tensor
from vl_tutor.data.images import centre_crop, clip_transform, open_image, resize_short
from vl_tutor.models.backbones import ViT, clip_rules, gpt2_layer_rules, published_gpt, published_vit
from vl_tutor.models.captioner import (Captioner, CaptionerConfig, CrossConfig, GatedCrossAttention, Mapper, MapperConfig, Resampler,
                                       ResamplerConfig, SIZES, caption_loss, captioner_keys, fitting_size, gated_rules, mapper_rules,
                                       published_config, resampler_rules)
from vl_tutor.models.parity import trace
from vl_tutor.primitives.attention import KVCache
from vl_tutor.primitives.transformer import Block
from vl_tutor.primitives.words import byte_pair_tokenizer, published_caption_ids
from vl_tutor.training import decoding, metrics
from vl_tutor.training.checkpoints import KeyMap
from vl_tutor.training.learner import BatchLoader, Schedule, StepLog, Table, make_learner, warmup_then_constant, warmup_then_cosine
from vl_tutor.training.objectives import captioning
from parity_golden import below, checker, fill, manifest_checker


def atol(fixture: str):
    "Name of a tensor → allowed absolute difference"
    def allowed(name: str) -> float:
        if fixture == 'metrics': return .05 if name in ('out.multi_ref', 'out.single_ref') else 1e-12
        if name.startswith('after.') or name == 'out.delta_norms': return 1e-4
        if name.endswith(('ids', 'tokens', 'tokens_mask', 'seq_lengths', 'has_stopped', 'visual_mask')): return 0.
        if name == 'out.grad_norms': return 1e-7
        if 'logits' in name: return 2e-5
        if name == 'out.lrs': return 1e-12
        return 1e-5
    return allowed


def rtol(fixture: str): return lambda name: 1e-4 if name == 'out.grad_norms' else 0.


# ---- the pieces ----

@checker('captioner/resampler', 'captioner/resampler_alt_activation')
@torch.no_grad()
def resampler(config, weights, io):
    a, out = config['args'], {}
    sizes = ResamplerConfig(a['depth'], a['heads'], a['dim_head'], a['num_latents'], a['num_time_embeds'], a['ff_mult'], a['activation'])
    model = fill(Resampler(a['dim'], sizes, mask_padding=False), KeyMap(resampler_rules('', '')), weights)
    with trace(model) as parts: masked = model(io['in.video'], io['in.video_mask'])
    for i in range(a['depth']):
        out[f'mid.video_masked.layer{i}.attn'] = parts[f'layers.{i}.attn']
        out[f'mid.video_masked.layer{i}.ffw'] = parts[f'layers.{i}.mlp']
    return out | {'out.video_masked': masked, 'out.video_unmasked': model(io['in.video']), 'out.image': model(io['in.image'], io['in.image_mask'])}


def cross_config(a: dict) -> CrossConfig:
    return CrossConfig(a['heads'], a['dim_head'], a['ff_mult'], a['activation'] if 'activation' in a else a['act'], a.get('freq', 1))


@checker('captioner/gated_xattn')
@torch.no_grad()
def gated_xattn(config, weights, io):
    a, cache = config['args'], KVCache()
    block = fill(GatedCrossAttention(a['dim'], a['dim_visual'], cross_config(a)), KeyMap(gated_rules('', '')), weights)
    flat = lambda visual: visual.flatten(1, 2)                        # (b images m dv) → (b images*m dv)
    with trace(block) as parts: y = block(io['in.y'], flat(io['in.visual']), cache=cache)
    out = {'out.k': cache.keys, 'out.v': cache.values, 'mid.attn_out': parts['attn'], 'mid.ffw_out': parts['mlp'], 'out.y': y}
    return out | {'out.y_step': block(io['in.y_step'], None, cache=cache), 'out.y_multi': block(io['in.y'], flat(io['in.visual_multi']))}


@checker('captioner/gated_xattn_lm_block')
@torch.no_grad()
def gated_xattn_lm_block(config, weights, io):
    a, text = config['args'], published_gpt(config['hf_text_config'])
    gated = fill(GatedCrossAttention(a['dim'], a['dim_visual'], cross_config(a)), KeyMap(gated_rules('', '')), below(weights, 'xattn_block.'))
    block = Block(text.width, text.heads, hidden=text.hidden, act=text.act, eps=text.eps, causal=True)
    fill(block, KeyMap(gpt2_layer_rules('', ''), drop=['attn.bias', 'attn.masked_bias']), below(weights, 'lm_block.'))
    seen = gated(io['in.hidden'], io['in.visual'].flatten(1, 2))
    return {'mid.after_xattn': seen, 'out.hidden': block(seen, keep=io['in.attention_mask'].bool())}


@checker('captioner/mapper_mlp', 'captioner/mapper_transformer')
def mapper(config, weights, io):
    a = config['args']
    kind = a['mapper_type']
    sizes = MapperConfig(kind, a['mlp_dim'] if kind == 'mlp' else a['dim_feedforward'], a['depth'], a['heads'])
    model = fill(Mapper(a['embedding_dim'], sizes, zero_padding=False), KeyMap(mapper_rules(sizes, '_mapper.', 'net.')), weights)
    with torch.no_grad(): out = {'out.mapped': model(io['in.x'], io['in.mask'])}
    return out if kind == 'mlp' else out | {'out.mapped_slowpath': model(io['in.x'], io['in.mask'])}


@checker('captioner/vision_encoder')
@torch.no_grad()
def vision_encoder(config, weights, io):
    vit, mask = published_vit(config['hf_vision_config']), io['in.mask']
    tower = fill(ViT(vit), KeyMap(clip_rules('vision.vision_model.'), optional=['vision.vision_model.embeddings.position_ids']), weights)
    with trace(tower) as parts: features = tower(io['in.video'].flatten(0, 1)).unflatten(0, io['in.video'].shape[:2])
    return {'mid.pre_ln': parts['norm_in'], 'out.features': features*mask[..., None, None]}


# ---- whole models ----

def build(config: dict, weights: dict) -> tuple[Captioner, object]:
    "The captioner of a fixture with its official weights, and its key map"
    ours = published_config(config['model_cfg'], config['hf_vision_config'], config['hf_text_config'])
    model, keys = Captioner.from_official(weights, ours), captioner_keys(ours)
    trained = {name for official in config['trainable_parameters'] for name in keys.translate(keys.spelled({official: torch.zeros(1)}), True)[0]}
    trained |= {n for n, _ in model.named_parameters() if set(keys.official_names(n)) & set(config['trainable_parameters'])}
    for name, p in model.named_parameters(): p.requires_grad_(name in trained)
    return model, keys


def norms(keys, tensors: dict[str, Tensor|None], names: list[str]) -> Tensor:
    "The length of each named tensor after the way back to official names"
    official = keys.to_official(tensors)
    return torch.stack([official[n].norm() for n in names])


@checker('captioner/model_full_image', 'captioner/model_full_video', 'captioner/model_mapper_only', 'captioner/model_resampler_only')
def whole_model(config, weights, io):
    model, keys = build(config, weights)
    ids, mask, known = io['in.tokens'], io['in.tokens_mask'], dict(lengths=io['in.video_length'], mask=io['in.tokens_mask'])
    with torch.no_grad():
        features, frames = model.see(io['in.video'], io['in.video_length'])
        prefix, visual = model.bridge(features, frames)
        out = {'mid.visual_mask': frames, 'mid.mapped': prefix} | ({} if visual is None else {'mid.resampled': visual})
        with trace(model) as parts: logits = model(io['in.video'], ids, **known)
        out |= {f'mid.block{i}': parts[f'lm.decoder.blocks.{i}'] for i in range(model.config.text.layers)}
        cache = model.prompt(io['in.video'], io['in.video_length'])
        few = next((n for n in range(ids.shape[1], 0, -1) if n <= 4), 1)
        out |= {'out.logits': logits, 'out.loss': caption_loss(logits, ids, mask, published=True),
                'out.last_logits_nomask': model.step(ids[:, :few], cache)}
    again = model(io['in.video'], ids, **known)
    if 'out.logits_gradpath' in io: out['out.logits_gradpath'] = again.detach()
    loss = model.loss(io['in.video'], ids, **known)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    still = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not still, f'frozen, but with a gradient: {still}'
    return out | {'out.loss_gradpath': loss.detach(), 'out.grad_norms': norms(keys, grads, config['trainable_parameters'])}


@manifest_checker('captioner')
def manifest(name: str, shapes: dict):
    config = fitting_size(shapes)
    with torch.device('meta'): ours = {k: v.shape for k, v in Captioner(config).state_dict().items()}
    keys = captioner_keys(config)
    got = keys.to_ours({k: torch.empty(v, device='meta') for k, v in shapes.items()}, ours)
    assert {k: v.shape for k, v in got.items()} == ours
    back = {k: list(v.shape) for k, v in keys.to_official(got).items()}
    buffers = [k for k in shapes if k not in back]
    assert all(k.endswith(('position_ids', '.attn.bias', '.attn.masked_bias')) for k in buffers), buffers
    assert back == {k: v for k, v in shapes.items() if k not in buffers}, 'the way back is another one'
    stem = name.removeprefix('manifest_').removesuffix('.json')
    assert stem not in SIZES or SIZES[stem].resampler == config.resampler and SIZES[stem].mapper == config.mapper, f'{name} is not the size {stem!r}'


# ---- decoding ----

def decoder(config: dict, weights: dict) -> Captioner:
    "The text side of a captioner; its eye is never opened"
    text, weights = published_gpt(config['hf_text_config']), {'text_generator.' + k: v for k, v in weights.items()}
    a, seeing = config['args'], any('.xattn_block.' in k for k in weights)
    eye = published_vit(dict(image_size=8, patch_size=8, hidden_size=text.width, num_hidden_layers=0, num_attention_heads=1, intermediate_size=1))
    whole = CaptionerConfig(eye, text, None, ResamplerConfig(0) if seeing else None, cross_config(a) if seeing else CrossConfig(), published=True)
    model = Captioner(whole).eval()
    for i in model.gated: model.gated[i] = GatedCrossAttention(text.width, a['dim_visual'], whole.cross)
    mine = {k: v for k, v in model.state_dict().items() if k.startswith(('lm.', 'gated.'))}
    missing, unknown = model.load_state_dict(captioner_keys(whole).to_ours(weights, mine), strict=False)
    assert not unknown and not {k for k in missing if k in mine}
    return model.eval()


@checker('captioner/decoding')
@torch.no_grad()
def decode(config, weights, io):
    model, out = decoder(config, weights), {}
    marks = dict(bos_id=config['bos_token_id'], eos_id=config['eos_token_id'])
    visual = io.get('in.resampled')
    for way, calls in config['calls'].items():
        for i, call in enumerate(calls):
            s = call.get('sample', i%len(io['in.prefix']))
            cache = model.new_cache(io['in.prefix'][s:s + 1], None if visual is None else visual[s:s + 1])
            out |= {f'out.{way}{i}.{k}': v for k, v in WAYS[way](model.step, cache, call, marks, io.get(f'in.{way}{i}.uniforms')).items()}
    return out


def greedy(step, cache, call, marks, _):
    return dict(ids=decoding.greedy(step, cache, max_len=call['maxlen'], **marks).ids[0])


def nucleus(step, cache, call, marks, uniforms):
    done = decoding.published_nucleus(step, cache, max_len=call['maxlen'], temperature=call['temp'], top_k=call['tk'], top_p=call['tp'],
                                      uniforms=uniforms[None], keep_probs=True, **marks)
    return dict(ids=done.ids[0], probs=done.probs[0])


def beam(step, cache, call, marks, _):
    done = decoding.published_beam(step, cache, max_len=call['maxlen'], width=call['bw'], results=call['bw'], temperature=call['temp'],
                                   published_cut=True, **marks)
    words = torch.tensor([marks['bos_id'], *done.words()[0]])          # what the authors decode to text
    return dict(tokens=done.ids, scores=done.scores, seq_lengths=done.lengths, has_stopped=done.stopped, best_ids=words)


WAYS = dict(greedy=greedy, nucleus=nucleus, beam=beam)


# ---- training ----

class Steps(Table):
    "The five captions of every picture and which one was drawn, cut into the very batches of the run"
    def __init__(self, io):
        flat = lambda name: io[name].flatten(0, 1)
        drawn = flat('in.caption_pick')[:, None, None]
        pick = lambda name: flat(name).take_along_dim(drawn, 1).squeeze(1)      # (b 5 n) → (b n)
        super().__init__(video=flat('in.video'), lengths=flat('in.video_length'), ids=pick('in.tokens'), mask=pick('in.tokens_mask'))


def schedule(c: dict) -> Schedule:
    "The official scheduler: warm-up in steps or as a share, then constant or half a cosine"
    shapes = dict(Linear=warmup_then_constant, CosineAnnealing=warmup_then_cosine)
    factor, steps, ratio = shapes[c['name']], c.get('warmup_steps'), c.get('warmup_ratio')
    if steps is None: return Schedule(factor, ratio=ratio)
    return Schedule(lambda step, _, total: factor(step, steps, total))


@checker('captioner/train_steps')
def train_steps(config, weights, io):
    model, keys = build(config, weights)
    o, size, log = config['optimizer_cfg'], io['in.video'].shape[1], StepLog()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loaders = DataLoaders(*[BatchLoader(Steps(io), size) for _ in range(2)], device=torch.device('cpu'))
    learn = make_learner(model, loaders, captioning, lr=o['lr'], wd=o['weight_decay'], betas=tuple(o['betas']), optimizer=o['name'],
                         schedule=schedule(o['scheduler']), cbs=[log], parts=['caption'])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        score = float(learn.validate()[0])
    rows = [row for row in log.rows if 'lr' in row]
    after = {n: p.detach() for n, p in model.named_parameters()}
    moved = norms(keys, {n: after[n] - before[n] for n in after}, config['trainable_parameters'])
    official, named = keys.to_official(after), [k for k in io if k.startswith('after.')]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and not torch.equal(after[n], before[n])]
    assert not frozen, f'frozen, but moved: {frozen}'
    return {'out.lrs': torch.tensor([r['lr'] for r in rows], dtype=torch.float64), 'out.losses': torch.tensor([r['loss'] for r in rows]),
            **{k: official[k.removeprefix('after.')] for k in named}, 'out.delta_norms': moved, 'out.eval_loss': torch.tensor(score)}


# ---- text, pictures, scores ----

def tidy(text: str) -> str:
    "What transformers 4.24 does to decoded text by default, blanks before marks taken out; ours leaves text as it is"
    for a, b in [(' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]:
        text = text.replace(a, b)
    return text


@checker('captioner/text_pipeline')
def text_pipeline(config, weights, io):
    tokenizer = byte_pair_tokenizer(config['bpe_merges_in_order'])
    ids, mask = published_caption_ids(tokenizer, config['texts'], config['max_length'])
    assert tokenizer.eos_id == config['endoftext_id']
    for name, keep in (('decoded_real_tokens', mask.bool()), ('decoded_including_zero_padding', torch.ones_like(mask).bool())):
        said = [tidy(tokenizer.text(row[k].tolist())) for row, k in zip(ids, keep)]
        assert said == config.get(name, said), f'{name}: {said}'
    return {'out.tokens': ids, 'out.tokens_mask': mask.long()}


@checker('captioner/image_preproc')
def image_preproc(config, weights, io):
    size, crop, mean, std = config['size'], config['crop_size'], config['image_mean'], config['image_std']
    def prepare(pixels):
        if size == crop: return clip_transform(pixels.numpy(), size, mean=mean, std=std)
        cut = torch.from_numpy(np.array(centre_crop(resize_short(open_image(pixels.numpy()), size), crop)))
        return (cut.permute(2, 0, 1).float()/255 - torch.tensor(mean)[:, None, None])/torch.tensor(std)[:, None, None]
    return {k.replace('in.', 'out.', 1): prepare(v) for k, v in io.items() if k.startswith('in.')}


@checker('captioner/metrics')
def scores(config, weights, io):
    pairs, out = [('predictions', 'references', 'out.multi_ref'), ('predictions_single', 'references_single', 'out.single_ref')], {}
    for preds, refs, name in pairs:
        got = metrics.published_scores(config[preds], config[refs])
        assert np.allclose(got[:2], io[name][:2], rtol=0, atol=1e-9), f'{name}: BLEU {got[:2]} instead of {io[name][:2].tolist()}'
        out[name] = torch.tensor(got, dtype=torch.float64)
    kept = [(p, r) for p, r in zip(config['predictions'], config['references']) if p.strip()]
    found, lines = metrics.bleu(*zip(*kept), 4), metrics.rouge_l(*zip(*kept))
    return out | {'out.rougeL_each': torch.tensor(lines.each, dtype=torch.float64),
                  'out.bleu_precisions': torch.tensor(found.precisions, dtype=torch.float64),
                  'out.bleu_brevity_lengths': torch.tensor([found.brevity, found.length, found.reference_length], dtype=torch.float64)}
