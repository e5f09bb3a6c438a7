"""The published captioner spelled out on the official tensors (spec sheet, sections 2, 3 and 7a), in functions without a class.

It shares no line with the package. The golden fixtures prove it faithful; then it makes fixtures of any other size and option."""
import math
import torch, torch.nn.functional as F
from torch import Tensor, nn

ACTS = dict(gelu=F.gelu, relu=F.relu, sqrelu=lambda x: F.relu(x)**2, gelu_new=lambda x: F.gelu(x, approximate='tanh'),
            quick_gelu=lambda x: x*torch.sigmoid(1.702*x))


def norm(w, name, x, eps=1e-5): return F.layer_norm(x, x.shape[-1:], w[name + '.weight'], w[name + '.bias'], eps)
def linear(w, name, x): return x @ w[name + '.weight'].T + w.get(name + '.bias', 0.)
def heads(x, h): return x.unflatten(-1, (h, -1)).transpose(1, 2)
def merge(x): return x.transpose(1, 2).flatten(2)


def attention(q, k, v, h, hidden=None):
    scores = heads(q, h)*(q.shape[-1]/h)**-.5 @ heads(k, h).transpose(2, 3)
    if hidden is not None: scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    return merge(scores.softmax(-1) @ heads(v, h))


def vision(w, images, c, at='vision_encoder.vision.vision_model.'):
    e = at + 'embeddings.'
    x = F.conv2d(images, w[e + 'patch_embedding.weight'], stride=c['patch_size']).flatten(2).transpose(1, 2)
    x = torch.cat([w[e + 'class_embedding'].expand(len(x), 1, -1), x], 1) + w[e + 'position_embedding.weight']
    first = x = norm(w, at + 'pre_layrnorm', x, c['layer_norm_eps'])
    for i in range(c['num_hidden_layers']):
        l = f'{at}encoder.layers.{i}.'
        y = norm(w, l + 'layer_norm1', x, c['layer_norm_eps'])
        q, k, v = (linear(w, f'{l}self_attn.{p}_proj', y) for p in 'qkv')
        x = x + linear(w, l + 'self_attn.out_proj', attention(q, k, v, c['num_attention_heads']))
        y = norm(w, l + 'layer_norm2', x, c['layer_norm_eps'])
        x = x + linear(w, l + 'mlp.fc2', ACTS[c['hidden_act']](linear(w, l + 'mlp.fc1', y)))
    return x, first


def mapper(w, x, mask, c, at='mapper._mapper.', fast=True):
    x = x.mean(2)
    if c['mapper_type'] == 'mlp':
        y = linear(w, at + '2', torch.tanh(linear(w, at + '0', x)))
        return y*mask[..., None]
    layer = nn.TransformerEncoderLayer(x.shape[-1], c['heads'], c['dim_feedforward'], batch_first=True)
    net = nn.TransformerEncoder(layer, c['depth']).eval()
    weights = {k: w[at + k] for k, _ in net.named_parameters()}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try: return torch.func.functional_call(net, weights, (x,), dict(src_key_padding_mask=~mask))
    finally: torch.backends.mha.set_fastpath_enabled(before)


def resampler(w, x, mask, c, at='resampler.', steps=None):
    b, t, n, d = x.shape
    times = w[at + 'time_pos_emb'][:t].unsqueeze(0).expand(b, -1, -1, -1)
    if mask is not None: times = times*mask[:, :, None, None]
    media, z = (x + times).flatten(1, 2), w[at + 'latents'].expand(b, -1, -1)
    for i in range(c['depth']):
        a, f = f'{at}layers.{i}.0.', f'{at}layers.{i}.1.'
        q = norm(w, a + 'norm_latents', z)
        context = torch.cat([norm(w, a + 'norm_media', media), q], 1)
        branch = linear(w, a + 'to_out', attention(linear(w, a + 'to_q', q), linear(w, a + 'to_k', context), linear(w, a + 'to_v', context), c['heads']))
        z = z + branch
        thought = linear(w, f + '3', ACTS[c['activation']](linear(w, f + '1', norm(w, f + '0', z))))
        z = z + thought
        if steps is not None: steps[f'layer{i}.attn'], steps[f'layer{i}.ffw'] = branch, thought
    return norm(w, at + 'norm', z)


def gated(w, y, visual, c, at, steps=None):
    q = linear(w, at + 'attn.to_q', norm(w, at + 'attn.layer_norm', y))
    k, v = linear(w, at + 'attn.to_kv', visual).chunk(2, -1)
    branch = linear(w, at + 'attn.to_out', attention(q, k, v, c['heads']))
    y = y + w[at + 'alpha_attn'].tanh()*branch
    thought = linear(w, at + 'ffw.3', ACTS[c.get('activation') or c['act']](linear(w, at + 'ffw.1', norm(w, at + 'ffw.0', y))))
    if steps is not None: steps.update(attn_out=branch, ffw_out=thought, k=heads(k, c['heads']), v=heads(v, c['heads']))
    return y + w[at + 'alpha_ffw'].tanh()*thought


def lm_layer(w, x, keep, c, at):
    conv = lambda name, y: y @ w[f'{at}{name}.weight'] + w[f'{at}{name}.bias']
    n = x.shape[1]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)[None, None]
    if keep is not None: hidden = hidden | ~keep[:, None, None]
    q, k, v = conv('attn.c_attn', norm(w, at + 'ln_1', x, c['layer_norm_epsilon'])).chunk(3, -1)
    x = x + conv('attn.c_proj', attention(q, k, v, c['n_head'], hidden))
    return x + conv('mlp.c_proj', ACTS[c['activation_function']](conv('mlp.c_fc', norm(w, at + 'ln_2', x, c['layer_norm_epsilon']))))


def language(w, prefix, visual, ids, keep, config, at='text_generator.lm.', steps=None):
    "Logits of every position"
    c, cross, lm = config['hf_text_config'], config['cross'], at + 'transformer.'
    x = torch.cat([prefix, w[lm + 'wte.weight'][ids]], 1)
    x = x + w[lm + 'wpe.weight'][:x.shape[1]]
    for i in range(c['n_layer']):
        wrapped = visual is not None and i%cross['freq'] == 0
        if wrapped: x = gated(w, x, visual, cross, f'{lm}h.{i}.xattn_block.')
        x = lm_layer(w, x, keep, c, f'{lm}h.{i}.' + 'lm_block.'*wrapped)
        if steps is not None: steps[f'mid.block{i}'] = x
    return norm(w, lm + 'ln_f', x, c['layer_norm_epsilon']) @ w[lm + 'wte.weight'].T


def bridge(w, video, length, config, fast, steps=None):
    m = config['model_cfg']
    mask = torch.arange(video.shape[1]) < length[:, None]
    x = vision(w, video.flatten(0, 1), config['hf_vision_config'])[0].unflatten(0, video.shape[:2])*mask[..., None, None]
    prefix = mapper(w, x, mask, m['mapper'], fast=fast) if m['enable_mapper'] else x.mean(2)
    visual = resampler(w, x, mask, m['resampler']) if m['enable_resampler_xattn'] else None
    if steps is not None: steps |= {'mid.visual_mask': mask, 'mid.mapped': prefix} | ({} if visual is None else {'mid.resampled': visual})
    return prefix, visual, mask


def loss_of(logits, ids): return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0)


def forward(w, io, config, fast=True, steps=None):
    "Teacher-forced logits: row j scores word j"
    prefix, visual, mask = bridge(w, io['in.video'], io['in.video_length'], config, fast, steps)
    logits = language(w, prefix, visual, io['in.tokens'], torch.cat([mask, io['in.tokens_mask'].bool()], 1), config, steps=steps)
    return logits[:, prefix.shape[1] - 1:-1]


def whole_model(w, io, config):
    "Everything that a model fixture stores"
    out = {}
    with torch.no_grad():
        out['out.logits'] = forward(w, io, config, steps=out)
        out['out.loss'] = loss_of(out['out.logits'], io['in.tokens'])
        prefix, visual, _ = bridge(w, io['in.video'], io['in.video_length'], config, True)
        out['out.last_logits_nomask'] = language(w, prefix, visual, io['in.tokens'][:, :4], None, config)[:, -1]
    learn = {k: v.clone().requires_grad_(k in config['trainable_parameters']) for k, v in w.items()}
    logits = forward(learn, io, config, fast=False)
    loss = loss_of(logits, io['in.tokens'])
    loss.backward()
    grads = [learn[k].grad.norm() if learn[k].grad is not None else torch.zeros(()) for k in config['trainable_parameters']]
    return out | {'out.logits_gradpath': logits.detach(), 'out.loss_gradpath': loss.detach(), 'out.grad_norms': torch.stack(grads)}


def train_steps(w, io, config):
    "The official loop: one caption drawn per picture, one scheduler step per batch, then an evaluation pass"
    o, names, steps = config['optimizer_cfg'], config['trainable_parameters'], len(io['in.video'])
    learn = {k: v.clone().requires_grad_(k in names) for k, v in w.items()}
    kind = torch.optim.AdamW if o['name'] == 'adamw' else torch.optim.Adam
    opt = kind([learn[k] for k in names], lr=o['lr'], betas=tuple(o['betas']), weight_decay=o['weight_decay'])
    warm = o['scheduler']['warmup_steps'] if o['scheduler']['warmup_steps'] is not None else int(steps*o['scheduler']['warmup_ratio'])
    constant = o['scheduler']['name'] == 'Linear'
    after = lambda s: 1. if constant else .5*(1 + math.cos(math.pi*(s - warm)/max(1, steps - warm)))
    plan = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: s/max(1, warm) if s < warm else after(s))
    losses, lrs = [], []
    def batch(s):
        rows = torch.arange(io['in.video'].shape[1])
        pick = {f'in.{n}': io[f'in.{n}'][s, rows, io['in.caption_pick'][s]] for n in ('tokens', 'tokens_mask')}
        return {'in.video': io['in.video'][s], 'in.video_length': io['in.video_length'][s], **pick}
    def loss(s, fast): return loss_of(forward(learn, b := batch(s), config, fast), b['in.tokens'])
    for s in range(steps):
        opt.zero_grad()
        now = loss(s, False)
        now.backward(); lrs.append(opt.param_groups[0]['lr']); opt.step(); plan.step()
        losses.append(now.item())
    with torch.no_grad(): score = sum(loss(s, True).item() for s in range(steps))/steps
    moved = torch.stack([(learn[k] - w[k]).norm().detach() for k in names])
    return {'out.lrs': torch.tensor(lrs, dtype=torch.float64), 'out.losses': torch.tensor(losses), 'out.eval_loss': torch.tensor(score),
            'out.delta_norms': moved, **{f'after.{k}': learn[k].detach() for k in names if learn[k].numel() <= 200}}
