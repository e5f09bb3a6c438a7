"Learning rates and weight decay by name, and the older AdamW."
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest
import torch
from torch import nn
from vl_tutor.models.classifier import Classifier, ClassifierConfig
from vl_tutor.models.vlc import SIZES, VLC
from vl_tutor.training.checkpoints import load_checkpoint, save_checkpoint
from vl_tutor.training.layer_decay import (OldAdamW, classifier_groups, finetuning_groups, freeze, group_table, layer_groups, layer_id, lr_scales_ref, old_adamw_ref,
                                           pretraining_groups, trunk_depth)
from vl_tutor.training.learner import OPTIMIZERS, Schedule, Table, dict_loaders, make_learner, quiet_fit
from vl_tutor.training.schedules import warmup_then_linear

LISTS = Path(__file__).resolve().parents[1]/'golden'/'vlc'
TINY = replace(SIZES['tiny'], tasks=('mlm', 'itm', 'vqa', 'rank'))
PICTURE = ClassifierConfig(32, 8, 64, 3, 4, 256, 10)


def on_paper(config) -> VLC:
    with torch.device('meta'): return VLC(config)


@pytest.mark.parametrize('depth', [1, 2, 12, 24])
def test_every_layer_has_its_number(depth):
    model = on_paper(replace(TINY, layers=depth))
    found = {layer_id(name, depth) for name, _ in model.named_parameters()}
    assert found == set(range(depth + 2)) and trunk_depth(model) == depth


@pytest.mark.parametrize('name', ['trunk.norm.weight', 'decoder.blocks.blocks.0.norm1.weight', 'decoder.embed.weight', 'pooler.bias', 'heads.mlm.words.weight', 'norm.weight', 'head.bias'])
def test_what_is_behind_the_blocks_is_last(name): assert layer_id(name, 12) == 13


@pytest.mark.parametrize('decay', [1., .9, .65, .5])
@pytest.mark.parametrize('rule', [finetuning_groups, classifier_groups])
def test_timm_agrees_with_the_rule_spelled_out(rule, decay):
    for model in (on_paper(TINY), Classifier(PICTURE)):
        want = lr_scales_ref(model, decay)
        table = group_table(model, rule(model, decay=decay))
        assert {k: v[0] for k, v in table.items() if v != 'frozen'} == {k: v for k, v in want.items() if table[k] != 'frozen'}
        assert [k for k, v in table.items() if v == 'frozen'] == [k for k, p in model.named_parameters() if not p.requires_grad]


def test_every_parameter_is_in_one_group():
    model = on_paper(TINY)
    for rule in (finetuning_groups, classifier_groups, pretraining_groups):
        found = [id(p) for g in rule(model) for p in g['params']]
        assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('size,file', [('vqa', 'vqa_576'), ('nlvr2', 'nlvr2_384'), ('retrieval', 'irtr_384')])
def test_defaults_are_the_recorded_rates_of_the_released_size(size, file):
    model, said = on_paper(SIZES[size]), json.loads((LISTS/f'lr_scales_vlc_base_{file}.json').read_text())
    if size == 'retrieval': freeze(model, 'heads.itm')
    table = group_table(model, finetuning_groups(model))
    count = lambda values: sorted(map(str, ((tuple(v) if isinstance(v, list) else v) for v in values)))
    assert len(table) == len(said) and count(table.values()) == count(said.values())     # name by name: tests/parity


def test_defaults_of_the_classifier_and_of_pretraining():
    said = json.loads((LISTS/'lr_scales_imagenet_base_gap_384.json').read_text())
    with torch.device('meta'): model = Classifier(ClassifierConfig(image_size=384))
    assert sorted(group_table(model, classifier_groups(model)).values()) == sorted(map(tuple, said.values()))
    said, model = json.loads((LISTS/'optim_groups_vlc_base_pretrain.json').read_text()), on_paper(SIZES['base'])
    table = group_table(model, pretraining_groups(model))
    for decay, n in ((.01, sum(v == [.01, True] for v in said.values())), (0., sum(v == [0., True] for v in said.values()))):
        assert sum(v == (1., decay) for v in table.values()) == n > 90
    assert sum(v == 'frozen' for v in table.values()) == sum(not v[1] for v in said.values()) == 2


def test_tokens_and_positions():
    model, picture = on_paper(TINY), Classifier(PICTURE)
    tuned, first, shown = (group_table(m, rule(m)) for m, rule in ((model, finetuning_groups), (model, pretraining_groups), (picture, classifier_groups)))
    assert [tuned[n][1] for n in ('trunk.cls', 'decoder.mask', 'heads.vqa.1.weight', 'heads.mlm.bias', 'text.norm.weight')] == [.01, .01, 0., 0., 0.]
    assert [first[n][1] for n in ('trunk.cls', 'decoder.mask', 'heads.vqa.1.weight', 'heads.mlm.bias', 'text.norm.weight')] == [.01, .01, .01, 0., 0.]
    assert [shown[n][1] for n in ('trunk.cls', 'trunk.positions', 'trunk.patches.proj.weight', 'norm.weight')] == [0., 0., .05, 0.]


def test_learned_positions_of_a_vlc_are_fine_tuned():
    model = on_paper(replace(TINY, positions='learned', decoder_layers=0))
    assert group_table(model, finetuning_groups(model))['trunk.positions'] == (1/16, .01)


@pytest.mark.parametrize('pool,differs', [('gap', []), ('cls', ['norm.weight', 'norm.bias'])])
def test_timms_own_vit(pool, differs):
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10, global_pool='avg' if pool == 'gap' else 'token')
    theirs = group_table(vit, param_groups_layer_decay(vit, .05, vit.no_weight_decay(), layer_decay=.65))
    ours = group_table(model := Classifier(replace(PICTURE, pool=pool)), classifier_groups(model))
    turn = {'cls_token': 'trunk.cls', 'pos_embed': 'trunk.positions', 'patch_embed.': 'trunk.patches.', 'blocks.': 'trunk.encoder.blocks.', 'fc_norm.': 'norm.', 'attn.qkv': 'attn.to_qkv',
            'attn.proj': 'attn.to_out', 'fc1': 'up', 'fc2': 'down'}
    def name(theirs):
        for a, b in turn.items(): theirs = theirs.replace(a, b, 1)
        return theirs
    assert {name(k) for k in theirs} == set(ours)
    assert [k for k, v in theirs.items() if ours[name(k)] != v] == differs
    assert all(theirs[k] == (.65, 0.) and ours[k] == (1., 0.) for k in differs)


@pytest.mark.parametrize('decay', [0, -.5, 1.1])
def test_a_factor_that_is_none(decay):
    with pytest.raises(ValueError, match='up to 1, not'): layer_groups(on_paper(TINY), decay=decay, wd=.1, spared=lambda n, p: False)


def test_a_model_without_a_trunk():
    with pytest.raises(ValueError, match='Linear has no trunk'): finetuning_groups(nn.Linear(2, 2))


def test_freeze_names_what_is_not_there():
    model = freeze(VLC(TINY), 'heads.itm', 'trunk.encoder.blocks.0.')
    frozen = [k for k, v in group_table(model, finetuning_groups(model)).items() if v == 'frozen']
    assert 'heads.itm.weight' in frozen and 'trunk.encoder.blocks.0.attn.to_qkv.bias' in frozen and 'trunk.encoder.blocks.1.attn.to_qkv.bias' not in frozen
    with pytest.raises(ValueError, match="VLC has nothing that begins with 'heads.judge'"): freeze(model, 'heads.judge')


@pytest.mark.parametrize('betas,eps,wd', [((.9, .98), 1e-8, .01), ((.9, .999), 1e-3, 0.), ((0., .5), 1e-8, .3)])
def test_old_adamw_is_its_slow_twin(betas, eps, wd):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((3, 4), (5,), ())]
    grads = [[torch.randn_like(p)*10.**-k for k in range(7)] for p in start]
    lrs = [0., .1, .3, .2, .1, .05, .01]
    mine = [nn.Parameter(p.clone()) for p in start]
    opt = OldAdamW([dict(params=mine[:1]), dict(params=mine[1:])], betas=betas, eps=eps, weight_decay=wd)
    for step, lr in enumerate(lrs):
        for group in opt.param_groups: group['lr'] = lr
        for p, g in zip(mine, grads): p.grad = g[step]
        opt.step()
    for p, s, g in zip(mine, start, grads):
        assert torch.allclose(p, old_adamw_ref(s, g, lrs=lrs, betas=betas, eps=eps, wd=wd)[-1], atol=1e-6, rtol=1e-6)


def test_old_adamw_is_not_torchs():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for opt, x in ((OldAdamW([p], lr=.1, weight_decay=.5), p), (torch.optim.AdamW([q], lr=.1, betas=(.9, .98), weight_decay=.5), q)):
        x.grad = torch.tensor([1e-8, 1e-4, 1.])
        opt.step()
    assert torch.allclose(q[1:], torch.tensor(.95 - .1).expand(2), atol=1e-4) and torch.allclose(p[2], torch.tensor(.9*.95), atol=1e-6)
    assert abs(p[0].item() - .95*(1 - .1*.02**.5/(.02**.5 + 1))) < 1e-5 and abs(q[0].item() - (.95 - .05)) < 1e-5


def test_a_parameter_without_gradient_waits():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = OldAdamW([p, q], lr=.1)
    p.grad = torch.ones(2)
    opt.step()
    assert torch.equal(q, torch.ones(2)) and q not in opt.state
    q.grad = torch.ones(2)
    before = p.detach().clone()
    p.grad = None
    opt.step()
    assert opt.state[q]['step'] == 1 and opt.state[p]['step'] == 1 and torch.equal(p, before)


def test_closure_is_called_with_gradients():
    p = nn.Parameter(torch.ones(2))
    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert OldAdamW([p], lr=.1).step(closure).item() == 2. and (p < 1).all()


def test_old_adamw_goes_on_after_a_checkpoint(tmp_path):
    def run(stop):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4))
        opt = OldAdamW([p], lr=.1)
        for step in range(6):
            if step == stop:
                save_checkpoint(tmp_path, optimizer=opt, p=p)
                p = nn.Parameter(load_checkpoint(tmp_path)['p'])
                opt = OldAdamW([p], lr=.5)
                load_checkpoint(tmp_path, optimizer=opt)
            p.grad = torch.full((4,), float(step))
            opt.step()
        return p
    assert torch.equal(run(None), run(3))


def test_the_learner_takes_rule_optimizer_and_schedule():
    model = freeze(VLC(replace(SIZES['tiny'], tasks=('itm', 'rank'))), 'heads.itm')
    data = Table(image=torch.randn(16, 3, 32, 32), ids=torch.randint(64, (16, 5)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn = make_learner(model, dict_loaders(data, bs=4, device='cpu'), lambda m, b: dict(rank=m.rank(b['image'], b['ids']).mean()), lr=1e-3, groups=partial(finetuning_groups, decay=.7),
                         optimizer='transformers_adamw', schedule=Schedule(warmup_then_linear, ratio=.25))
    quiet_fit(learn, 1)
    opt = learn.opt.opt
    assert isinstance(opt, OldAdamW) and OPTIMIZERS['transformers_adamw'] is OldAdamW
    assert sorted({round(g['lr'], 9) for g in opt.param_groups}) == sorted({round(1e-3*warmup_then_linear(3, 1, 4)*.7**k, 9) for k in range(5)})
    after = model.state_dict()
    assert torch.equal(after['heads.itm.weight'], before['heads.itm.weight']) and not torch.equal(after['heads.rank.weight'], before['heads.rank.weight'])
