"How VLC's own fixtures are built from their config.json: both pre-training passes, each head, files of other sizes, lightning's file."
import torch
from vl_tutor.models.classifier import Classifier
from vl_tutor.models.mae import MAE, ViTTrunk, pixel_loss
from vl_tutor.models.parity import trace
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.models.vlc_files import Official, classifier_keys, classifier_sizes, kind_of, load_vlc_weights, mae_keys, official_tensors, open_official, vlc_keys, vlc_sizes
from vl_tutor.training.released import read_torch
from vl_tutor.training.transport import align_cost, left_out, transport_distance, transport_plan
from vl_tutor.training.vlc_objectives import answering, match_labels, mixed_up, pair_statements, pretraining, rank_scores, ranking
from parity_golden import ROOT, below, checker, manifest_checker


def sized(c: dict, *tasks: str, **more) -> VLCConfig:
    "The configuration of a fixture"
    hidden, painter = (int(c['mlp_ratio']*c[d]) for d in ('hidden_size', 'dec_dim'))
    return VLCConfig(c['image_size'], c['patch_size'], c['hidden_size'], c['num_layers'], c['num_heads'], hidden, c['vocab_size'], c['max_text_len'],
                     c['dec_dim'], c['dec_depth'], c['dec_heads'], tasks=tasks, answers=c.get('labels', VLCConfig.answers), decoder_hidden=None if painter == 4*c['dec_dim'] else painter, **more)


def given(io: dict) -> dict: return below(io, 'in.')


def named(tensors: dict, start: str = 'out.') -> dict: return {start + k: v for k, v in tensors.items()}


def inside(model: VLC, seen, ids, mask, **drop) -> tuple:
    "What was read, and every step on the way"
    if not hasattr(seen, 'tokens'): seen = model.see(seen, **drop)
    with trace(model) as parts: read = model(seen, ids, mask)
    steps = dict(bert_embeddings=model.text(ids), visual_embed=seen.tokens, **{f'block{i}': parts[f'trunk.encoder.blocks.{i}'] for i in range(model.config.layers)})
    return read, steps | dict(norm=torch.cat([read.text, read.image], 1), cls_feats=read.pooled)


# ---- pre-training ----

def masked_steps(model: VLC, g: dict, ratio: float) -> dict:
    read, steps = inside(model, g['image'], g['text_ids_mlm'], g['text_masks'], noise=g['noise_mlm'], ratio=ratio)
    kept, pixels = read.kept, model.pixels(read)
    loss = lambda normalise: pixel_loss(pixels, g['image'], kept.mask, patch=model.config.patch_size, normalise=normalise)
    return steps | dict(image_embeds_plus_type=steps['visual_embed'] + model.modality.weight[1], mae_mask=kept.mask, ids_restore=kept.restore, ids_shuffle=kept.restore.argsort(1),
                        mae_pred=pixels, mae_loss_unweighted=loss(True), mae_loss_raw_pixels_NOT_USED_BY_VLC=loss(False), mlm_logits=model.head('mlm')(read.text))


def matching_steps(model: VLC, g: dict, ratio: float) -> dict:
    labels = match_labels(len(g['image']), g['itm_perm'])
    images = mixed_up(dict(image=g['image'], false_image=g['false_image_0']), labels)
    read = model(images, g['text_ids'], g['text_masks'], noise=g['noise_itm'], ratio=ratio)
    pads = left_out(g['text_masks'], read.image)
    cost = align_cost(read.text, read.image, *pads)
    plan = transport_plan(cost, *pads)
    return dict(ot_cost=cost, ot_plan_T=plan, ot_distance=transport_distance(cost, plan), itm_logits=model.head('itm')(read.pooled), itm_labels=labels)


@checker('vlc/vlc_pretrain')
def pretrain(config, weights, io):
    c, g = config['config'], given(io)
    model = load_vlc_weights(weights, config=sized(c, 'mlm', 'itm'))
    with torch.no_grad(): masked, matched = masked_steps(model, g, c['mask_ratio']), matching_steps(model, g, c['mask_ratio'])
    out = {k: masked.pop(k) for k in ('mlm_logits',)} | {k: matched.pop(k) for k in ('itm_logits', 'itm_labels')}
    batch = dict(image=g['image'], false_image=g['false_image_0'], ids=g['text_ids'], mask=g['text_masks'], masked_ids=g['text_ids_mlm'], labels=g['text_labels_mlm'],
                 noise=g['noise_mlm'], match_noise=g['noise_itm'], match_order=g['itm_perm'])
    losses = pretraining(model, batch, ratio=c['mask_ratio'])
    total = sum(losses.values())
    total.backward()
    out |= {name: losses[ours].detach() for name, ours in dict(mlm_loss='mlm', mae_loss='mim', itm_loss='itm', itm_wpa_loss='wpa').items()} | dict(total_loss=total.detach())
    still = {n for n, p in model.named_parameters() if p.grad is None}
    assert still == {n for n, p in model.named_parameters() if not p.requires_grad} == {'trunk.positions', 'decoder.positions'}
    slopes = vlc_keys().to_official({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    asked = below(io, 'out.grad/')
    return named(masked, 'out.mlm_pass/') | named(matched, 'out.itm_pass/') | named(out) | named({k: slopes[k] for k in asked}, 'out.grad/')


@checker('vlc/eps_probe')
@torch.no_grad()
def eps_probe(config, weights, io):
    c, g = config['config'], given(io)
    model = load_vlc_weights(weights, config=sized(c, 'mlm', 'itm', 'vqa'))
    read, steps = inside(model, g['image'], g['text_ids'], g['text_masks'], noise=g['noise'], ratio=c['mask_ratio'])
    steps |= dict(mae_pred=model.pixels(read), mlm_logits=model.head('mlm')(read.text), vqa_logits=model.head('vqa')(read.pooled))
    return named({k: steps[k] for k in below(io, 'out.')})


# ---- fine-tuned models ----

def soft_targets(labels, scores, answers: int):
    "A row of scores over all answers; label -1 is an unused place"
    return torch.zeros(len(labels), answers + 1).scatter(1, labels.masked_fill(labels < 0, answers), scores)[:, :-1]


@checker('vlc/vlc_vqa')
@torch.no_grad()
def vqa(config, weights, io):
    c, g = config['config'], given(io)
    model = load_vlc_weights(weights, config=sized(c, 'vqa'))
    _, steps = inside(model, g['image'], g['text_ids'], g['text_masks'])
    targets = soft_targets(g['vqa_labels'], g['vqa_scores'], c['labels'])
    batch = dict(image=g['image'], ids=g['text_ids'], mask=g['text_masks'], targets=targets)
    logits = model.answer(g['image'], g['text_ids'], g['text_masks'])
    score = targets.gather(1, logits.argmax(1, keepdim=True)).mean()
    return named(steps, 'out.infer/') | named(dict(vqa_logits=logits, vqa_targets=targets, vqa_loss=answering(model, batch)['vqa'], vqa_score_metric=score))


@checker('vlc/vlc_nlvr2')
@torch.no_grad()
def nlvr2(config, weights, io):
    c, g, out = config['config'], given(io), {}
    model = load_vlc_weights(weights, config=sized(c, 'nlvr2', modalities=3))
    for i in range(2):
        seen = model.see(g[f'image_{i}'])
        out[f'cls_feats_{i}'] = model(seen, g['text_ids'], g['text_masks'], row=i + 1).pooled
        out[f'image_embeds_{i}'] = seen.tokens + model.modality.weight[i + 1]
    batch = dict(pair=torch.stack([g['image_0'], g['image_1']], 1), ids=g['text_ids'], mask=g['text_masks'], label=g['answers'])
    out |= dict(nlvr2_logits=model.judge(batch['pair'], batch['ids'], batch['mask']), nlvr2_loss=pair_statements(model, batch)['nlvr2'])
    return named(out)


@checker('vlc/vlc_irtr')
@torch.no_grad()
def irtr(config, weights, io):
    c, g = config['config'], given(io)
    model = load_vlc_weights(weights, config=sized(c, 'itm', 'rank'))
    choices = {kind: torch.stack([g[f'text_{kind}'], *(g[f'false_text_{i}_{kind}'] for i in range(c['n_false']))], 1) for kind in ('ids', 'masks')}   # (b k n)
    batch = dict(image=g['image'], choice_ids=choices['ids'], choice_mask=choices['masks'])
    rows = torch.arange(len(g['image'])).repeat_interleave(1 + c['n_false'])
    pooled = model(model.see(g['image'])[rows], choices['ids'].flatten(0, 1), choices['masks'].flatten(0, 1)).pooled
    one = rank_scores(model, model.see(g['image'][:1]), g['text_ids'][None], g['text_masks'][None])[0]
    return named(dict(cls_feats=pooled, score=rank_scores(model, g['image'], choices['ids'], choices['masks']), irtr_loss=ranking(model, batch)['rank'],
                      rank_image0_vs_texts=one, itm_logits_all=model.head('itm')(pooled)))


# ---- files ----

@checker('vlc/load_downstream')
@torch.no_grad()
def load_downstream(config, weights, io):
    source, target, g, out = config['config']['source'], config['config']['target'], given(io), {}
    for model_name, tasks in dict(vlc_nlvr2=('nlvr2',), vlc_irtr=('itm', 'rank')).items():
        model = load_vlc_weights(weights, tasks=tasks, image_size=target['image_size'], heads=source['num_heads'], decoder_heads=source['dec_heads'])
        read, theirs = model(g['image'], g['text_ids'], g['text_masks']), official_tensors(model)
        got = theirs | dict(cls_feats=read.pooled) | (dict(rank_score=model.head('rank')(read.pooled)[:, 0]) if 'rank' in tasks else {})
        out |= named({k: got[k] for k in below(io, f'out.{model_name}/')}, f'out.{model_name}/')
    return out


@checker('vlc/lightning_ckpt')
def lightning_ckpt(config, weights, io):
    "The whole way: the file, a model of ours, the authors' names again"
    path, c = ROOT/'vlc'/'lightning_ckpt'/'saved.ckpt', config['config']
    held = read_torch(path)
    assert {k: type(v).__name__ for k, v in held.items()} == config['checkpoint_top_level']
    opened = open_official(path)
    assert sorted(opened.beside) == sorted(config['hyper_parameter_keys'])
    assert set(opened.tensors) == set(weights) and all(torch.equal(t, weights[k]) for k, t in opened.tensors.items())
    model = load_vlc_weights(path, decoder_heads=c['dec_heads'])
    assert model.config == sized(c, *model.config.tasks), 'sizes are read from shapes and settings'
    return named(official_tensors(model))


def same_keys(keys, model: torch.nn.Module, shapes: dict, extra=()):
    "Every official name and shape finds one of ours, and every one of ours goes back to it"
    ours = {k: v.shape for k, v in model.state_dict().items()}
    got = keys.to_ours({k: torch.empty(v, device='meta') for k, v in shapes.items()}, ours)
    assert {k: v.shape for k, v in got.items()} == ours
    back = {k: list(v.shape) for k, v in keys.to_official(got).items()}
    assert back == {k: v for k, v in shapes.items() if k not in extra} and set(extra) <= set(shapes), 'the way back is another one'


@manifest_checker('vlc')
def manifest(name: str, shapes: dict):
    official = Official({k: torch.empty(v, device='meta') for k, v in shapes.items()}, name=name)
    kind = kind_of(shapes)
    assert name.startswith(f'manifest_{dict(classifier="imagenet").get(kind, kind)}_')
    with torch.device('meta'):
        if kind == 'classifier':
            sizes = classifier_sizes(official, '')
            return same_keys(classifier_keys(sizes.pool), Classifier(sizes), shapes)
        sizes = vlc_sizes(official)
        if kind != 'mae': return same_keys(vlc_keys(), VLC(sizes), shapes, ['text_embeddings.position_ids'])
        trunk = ViTTrunk(image_size=sizes.image_size, patch_size=sizes.patch_size, width=sizes.width, layers=sizes.layers, heads=sizes.heads, hidden=sizes.hidden)
        model = MAE(trunk, dim=sizes.decoder_width, layers=sizes.decoder_layers, heads=sizes.decoder_heads)
    return same_keys(mae_keys(), model, shapes)
