"How VLC's optimiser, its learning rates and its ImageNet classifier are built from their own config.json and lists."
import json
import re
from functools import partial
from pathlib import Path
import torch
from torch import nn
from vl_tutor.models.classifier import Classifier, ClassifierConfig, classify, given_paths
from vl_tutor.models.vlc import VLC, VLCConfig
from vl_tutor.models.vlc_files import OFFICIAL_HEADS, classifier_keys, official_tensors, read_classifier, vlc_keys
from vl_tutor.training.checkpoints import KeyMap
from vl_tutor.training.layer_decay import UNDECAYED, OldAdamW, classifier_groups, finetuning_groups, freeze, group_table, pretraining_groups
from vl_tutor.training.schedules import cosine_to_floor, warmup_then_linear
from parity_golden import ROOT, checker, fill

@checker('vlc/optim')
def optim(config, weights, io):
    c = config['config']
    decay, plain = (nn.Parameter(io[f'in.p_{kind}'].clone()) for kind in ('decay', 'nodecay'))
    groups = [dict(params=[decay], weight_decay=c['weight_decay']), dict(params=[plain], weight_decay=0., lr_scale=c['lr_scale_b'])]
    optimizer, steps, rates = OldAdamW(groups, lr=c['lr']), [], []
    for step in range(c['steps']):
        for group in optimizer.param_groups: group['lr'] = c['lr']*warmup_then_linear(step, c['warmup'], c['steps'])*group.get('lr_scale', 1.)
        decay.grad, plain.grad = io['in.grads_decay'][step], io['in.grads_nodecay'][step]
        optimizer.step()
        steps.append([decay.detach().clone(), plain.detach().clone()])
        rates.append([group['lr'] for group in optimizer.param_groups])
    first, second = (torch.stack(rows) for rows in zip(*steps))
    out = {'out.lr_used_at_step': torch.tensor(rates), 'out.p_decay_after_step': first, 'out.p_nodecay_after_step': second, 'out.lr_factor_steps': io['out.lr_factor_steps']}
    for name in io:
        if found := re.fullmatch(r'out\.lr_factor_warmup(\d+)_total(\d+)', name):
            out[name] = torch.tensor([warmup_then_linear(s, *map(int, found.groups())) for s in io['out.lr_factor_steps'].tolist()])
    return out


def classifier_of(c: dict) -> Classifier:
    return Classifier(ClassifierConfig(c['image_size'], c['patch_size'], c['hidden_size'], c['num_layers'], c['num_heads'], round(c['mlp_ratio']*c['hidden_size']),
                                       c['num_classes'], 'gap' if c['global_pool'] else 'cls', c['drop_path']))


@checker('vlc/imagenet_gap', 'vlc/imagenet_cls')
def imagenet(config, weights, io):
    model = classifier_of(config['config'])
    keys, images = classifier_keys(model.config.pool), io['in.image']
    fill(model, keys, weights)
    x, out = model.trunk.embed(images)[0], {}
    for i, block in enumerate(model.trunk.encoder.blocks): out[f'out.block{i}'] = x = block(x)
    out['out.features'], out['out.logits'] = model.features(images), model(images)
    hard, soft = dict(image=images, label=io['in.target']), dict(image=images, targets=io['in.soft_target'])
    out['out.loss_ce'], out['out.loss_soft_target'] = classify(model, hard)['classify'], classify(model, soft)['classify']
    for name in io:
        if name.startswith('out.loss_label_smoothing_'): out[name] = classify(model, hard, smoothing=float(name.rpartition('_')[2]))['classify']
    with given_paths(model.train(), io['in.drop_path_u']): out['out.train_logits_with_pinned_drop_path'] = model(images)
    check_cosine(config['cosine_lr_table_epoch_lr'])
    check_filling(model, keys, config['loading_vlc_transformer_weights'])
    return out


def check_cosine(said: dict):
    factor = cosine_to_floor(said['min_lr']/said['lr'])
    for epoch, rate in said['rows']:
        ours = said['lr']*factor(epoch, said['warmup_epochs'], said['epochs'])
        assert abs(ours - rate) < 1e-9*said['lr'], f'epoch {epoch}: {ours}, not {rate}'


def check_filling(model: Classifier, keys: KeyMap, said: dict):
    "What a VLC of the same trunk leaves open in a classifier, and what it brings in vain, by official name"
    c = model.config
    blocks = {found[1] for name in said['unexpected'] if (found := re.match(r'decoder_blocks\.(\d+)\.', name))}
    giver = VLC(VLCConfig(c.image_size, c.patch_size, c.width, c.layers, c.heads, c.hidden, 8, 4, 16, len(blocks), 2)).requires_grad_(False)
    report, theirs = model.fill(giver), vlc_keys()
    assert sorted(said['missing']) == sorted(name for ours in report.missing for name in keys.official_names(ours))
    unused = [name for ours in report.unused for name in theirs.official_names(ours)]
    assert sorted(said['unexpected']) == sorted(name.removeprefix('transformer.') for name in unused if name.startswith('transformer.'))
    read = read_classifier(official_tensors(giver), classes=c.classes, pool=c.pool, heads=c.heads)
    assert sorted(read.new) == sorted(said['missing']) and sorted(read.unused) == sorted(said['unexpected'])
    ours = read.model.state_dict()
    assert all(torch.equal(t, ours[name]) for name, t in model.state_dict().items() if name not in report.missing)


def group_lists(root: Path = ROOT) -> list[str]:
    "Every list of learning rates and weight decays: files of their own, and those inside a fixture's config.json"
    files = [p for kind in ('lr_scales', 'optim_groups') for p in root.glob(f'vlc/{kind}_*.json')]
    inside = [f'{p.relative_to(root)}:{key}' for p in root.glob('vlc/*/config.json') for key in json.loads(p.read_text()) if 'lr_scales' in key or 'optimizer_groups' in key]
    return sorted([p.relative_to(root).as_posix() for p in files] + inside)


LISTS = ROOT if group_lists() else Path(__file__).resolve().parents[1]/'golden'      # a root without lists: those of the repository


def read_list(name: str) -> dict:
    "Official name → learning-rate scale, weight decay, group (or None), trained; scale 1 where the list gives none"
    file, _, key = name.partition(':')
    found, said = json.loads((LISTS/file).read_text()), {}
    for k, v in (found[key] if key else found).items():
        if v == 'frozen': said[k] = (None, None, None, False)
        elif isinstance(v, dict): said[k] = (v.get('lr_scale', 1.), v['weight_decay'], v['group'], v.get('requires_grad', True))
        else: said[k] = (1., v[0], None, v[1]) if isinstance(v[1], bool) else (*v, None, True)
    return said


def model_with(names) -> tuple[nn.Module, KeyMap]:
    "The smallest model of ours that has these official names"
    count = lambda start: 1 + max((int(found[1]) for n in names if (found := re.match(start + r'(\d+)\.', n))), default=-1)
    if 'cls_token' in names:
        pool = 'gap' if 'fc_norm.weight' in names else 'cls'
        return Classifier(ClassifierConfig(8, 4, 8, count('blocks.'), 1, 8, 2, pool)), classifier_keys(pool)
    tasks = tuple(task for task, start in OFFICIAL_HEADS.items() if any(n.startswith(start) for n in names))
    model = VLC(VLCConfig(8, 4, 8, count('transformer.blocks.'), 1, 8, 8, 4, 8, count('transformer.decoder_blocks.'), 1, tasks=tasks, answers=2))
    return freeze(model, 'heads.itm') if 'rank' in tasks else model, vlc_keys()


def check_group_list(name: str):
    "Every name of a list has the rate, the decay and the group that ours has; neither side has a name more"
    said = read_list(name)
    model, keys = model_with(said)
    scales, decays = ({v[i] for v in said.values() if v[3]} for i in (0, 1))
    rule = classifier_groups if 'cls_token' in said else finetuning_groups
    rule = partial(rule, decay=max(s for s in scales if s < 1)) if len(scales) > 1 else pretraining_groups
    groups = rule(model, wd=max(decays))
    table, number = group_table(model, groups), {id(p): i for i, g in enumerate(groups) for p in g['params']}
    official = {keys.official_names(ours)[0]: (ours, p) for ours, p in model.named_parameters()}
    assert sorted(official) == sorted(said), f'{name}: of one side only: {sorted(set(official) ^ set(said))}'
    pairs = set()
    for theirs, (scale, decay, group, trained) in said.items():
        ours, p = official[theirs]
        assert p.requires_grad == trained and table[ours] == ((scale, decay) if trained else 'frozen'), f'{name}: {theirs} has {scale, decay}, {ours} {table[ours]}'
        assert trained or decay in (None, 0. if any(part in ours for part in UNDECAYED) else max(decays)), f'{name}: {theirs} would have {decay}'
        if trained and group is not None: pairs.add((group, number[id(p)]))
    assert all(len({pair[i] for pair in pairs}) == len(pairs) for i in (0, 1)), f'{name}: other groups: {sorted(pairs)}'
