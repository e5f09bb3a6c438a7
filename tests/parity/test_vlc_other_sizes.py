"Nothing in VLC's checkers is tied to the sizes of the stored fixtures: models of other sizes, random weights under official names, every result asked for."
from pathlib import Path
import pytest
import torch
import parity_vlc_models as ours
from parity_golden import CHECKERS, compare
from vl_tutor.models.parity import read_golden
from vl_tutor.models.vlc import VLC
from vl_tutor.models.vlc_files import official_tensors

GOLDEN = Path(__file__).resolve().parents[1]/'golden'/'vlc'


def other(seed: int) -> dict:
    "Sizes that no stored fixture has"
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[torch.randint(len(options), (), generator=g)]
    heads, dec_heads, patch = pick(1, 5), pick(1, 2), pick(4, 6)
    return dict(vocab_size=pick(41, 57), hidden_size=20*heads, num_layers=pick(1, 4), num_heads=heads, mlp_ratio=pick(2, 3, 4), max_text_len=pick(7, 9), patch_size=patch,
                image_size=patch*pick(3, 5), mask_ratio=pick(.25, .7), dec_dim=8*dec_heads, dec_depth=pick(1, 3), dec_heads=dec_heads, batch=pick(2, 5), labels=pick(4, 9), n_false=pick(1, 4))


def weights(c: dict, *tasks, **more) -> dict:
    torch.manual_seed(1)
    model = VLC(ours.sized(c, *tasks, **more))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2*torch.randn_like(p) + .5*(p.ndim == 1))
    return official_tensors(model)


def inputs(c: dict, names) -> dict:
    "One random input for each name that a stored fixture has"
    b, n, s, p = c['batch'], c['max_text_len'], c['image_size'], (c['image_size']//c['patch_size'])**2
    mask = (torch.arange(n) < torch.randint(4, n + 1, (b, 1))).long()
    ids = torch.randint(3, c['vocab_size'], (b, n))*mask
    def one(name):
        if 'image' in name: return torch.randn(b, 3, s, s)
        if name.startswith('noise'): return torch.rand(b, p)
        if name.endswith('masks'): return mask
        if name == 'text_labels_mlm': return torch.where(torch.arange(n) == 1, ids, -100)
        if name.startswith(('text_ids', 'false_text')): return ids
        if name == 'itm_perm': return torch.randperm(b)
        if name == 'vqa_labels': return torch.tensor([[2, 0, -1]]).repeat(b, 1)
        return torch.rand(b, 3) if name == 'vqa_scores' else torch.randint(2, (b,))
    return {f'in.{name}': one(name) for name in names}


def asked(fixture: str) -> list[str]:
    "The names of a stored fixture, 'in.…' and 'out.…'"
    return [k.replace('/', '.', 1) for k in read_golden(GOLDEN/fixture)[2]]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('fixture, tasks, more', [('vlc_pretrain', ('mlm', 'itm'), {}), ('eps_probe', ('mlm', 'itm', 'vqa'), {}), ('vlc_vqa', ('vqa',), {}),
                                                  ('vlc_nlvr2', ('nlvr2',), dict(modalities=3)), ('vlc_irtr', ('itm', 'rank'), {})])
def test_models_of_other_sizes(fixture, tasks, more, seed):
    c, names = other(seed), asked(fixture)
    theirs = weights(c, *tasks, **more)
    given = {k[3:] for k in names if k.startswith('in.') and 'false_text' not in k} | {f'false_text_{i}_{kind}' for i in range(c['n_false']) for kind in ('ids', 'masks') if fixture == 'vlc_irtr'}
    wanted = {k for k in names if k.startswith('out.') and '/block' not in k}
    io = inputs(c, given) | dict.fromkeys(wanted, torch.zeros(1))
    found = CHECKERS[f'vlc/{fixture}'](dict(config=c), theirs, io)
    blocks = {k for k in found if '/block' in k}
    assert set(found) - blocks == wanted and all(torch.isfinite(t).all() for t in found.values())
    assert len(blocks) == (c['num_layers'] if fixture in ('vlc_pretrain', 'vlc_vqa') else 0)


@pytest.mark.parametrize('seed', range(3))
def test_files_at_other_sizes(seed):
    source, names = other(seed), asked('load_downstream')
    target = dict(source, image_size=source['patch_size']*(2 + seed*2))
    io = inputs(target, [k[3:] for k in names if k.startswith('in.')]) | dict.fromkeys([k for k in names if k.startswith('out.')], torch.zeros(1))
    found = CHECKERS['vlc/load_downstream'](dict(config=dict(source=source, target=target)), weights(source, 'mlm', 'itm'), io)
    assert set(found) == {k for k in io if k.startswith('out.')} and found['out.vlc_nlvr2/transformer.pos_embed'].shape[1] == 1 + (2 + seed*2)**2


def test_a_wrong_weight_is_noticed():
    "A tenth on one bias of the last block: the first tensor named is that block's output"
    config, theirs, io = read_golden(GOLDEN/'vlc_vqa')
    io, last = {k.replace('/', '.', 1): v for k, v in io.items()}, config['config']['num_layers'] - 1
    key = f'transformer.blocks.{last}.mlp.fc2.bias'
    found = CHECKERS['vlc/vlc_vqa'](config, theirs | {key: theirs[key] + .1}, io)
    with pytest.raises(AssertionError, match=f'out.infer/block{last} differs'): compare(found, io, lambda name: 2e-5, lambda name: 2e-5)
