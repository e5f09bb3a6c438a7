"SIMLA's grounding at other sizes, and proof that its parity test can fail."
from pathlib import Path
import pytest
import torch
import parity_simla
from parity_golden import CHECKERS, compare, named
from parity_simla_grounding import TinySimla, both_maps, gradcam_grounding, load, rules
from tensors import shake
from vl_tutor.explain.gradcam import itc_gradcam, itm_gradcam
from vl_tutor.explain.one_call import explain
from vl_tutor.models.parity import read_golden
from vl_tutor.primitives.attention import record
from vl_tutor.training.checkpoints import KeyMap

NAME = 'simla/gradcam_grounding'
FOLDER = Path(__file__).resolve().parents[1]/'golden'/NAME
C = {'attention heads (vision and text)': 2, 'image side': 12, 'layer-norm eps vision': 1e-6, 'layer-norm eps text': 1e-12, 'map grid': 3,
     'cross-attention layer index used (official 8 of 12)': 2, 'vision block index used for itc': 0}


def judge(ours, io): return compare(ours, io, parity_simla.atol('gradcam_grounding'), parity_simla.rtol('gradcam_grounding'))


def other_size():
    "Four layers, three blocks, width 8: the official tensors of a model that nobody stored"
    _, weights, _ = read_golden(FOLDER)
    shapes = {k: tuple({12: 8, 36: 24, 20: 14, 48: 22, 50: 31, 24: 9}.get(n, n) for n in v.shape) for k, v in weights.items()}
    more = {k.replace('layer.2.', 'layer.3.').replace('blocks.1.', 'blocks.2.'): v for k, v in shapes.items()}
    shapes |= more | {'visual_encoder.patch_embed.proj.weight': (8, 3, 4, 4)}
    torch.manual_seed(0)
    official = KeyMap(rules()).to_official(shake(TinySimla(shapes, C)).state_dict())
    model = load(dict(config=C), official)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5]])
    return model, torch.randn(3, 3, 12, 12), torch.randint(4, 31, (3, 6))*mask, mask


def test_other_sizes_against_plain_backward():
    model, images, ids, keep = other_size()
    assert len(model.layers) == 4 and len(model.vision.blocks) == 3
    itm, itc, *_ = both_maps(model, C, images, ids, keep)
    with record(model, gradients=True) as seen: model.match(images, ids, keep)[:, 1].sum().backward()
    torch.testing.assert_close(itm, itm_gradcam(seen['layers.2.cross'].detach(), seen.gradients('layers.2.cross'), keep, (3, 3)), atol=1e-8, rtol=1e-4)
    with record(model, gradients=True) as seen: model.similar(images, ids, keep).sum().backward()
    torch.testing.assert_close(itc, itc_gradcam(seen['vision.blocks.0.attn'].detach(), seen.gradients('vision.blocks.0.attn'), (3, 3)), atol=1e-8, rtol=1e-4)
    assert itm.std() > 0 and itc.std() > 0


def test_padding_only_scales_the_map():
    model, images, ids, keep = other_size()
    alone, *_ = both_maps(model, C, images[1:2], ids[1:2, :3], keep[1:2, :3])
    together, *_ = both_maps(model, C, images, ids, keep)
    torch.testing.assert_close(alone[0]*3/6, together[1], atol=1e-8, rtol=1e-4)             # quirk Q10


def test_explain_gives_the_same_map_by_its_own_name():
    model, images, ids, keep = other_size()
    ex = explain(model, images[:1], (ids[:1], keep[:1]), 'match')
    itm, *_ = both_maps(model, C, images[:1], ids[:1], keep[:1])
    ex.case.whole = 1
    torch.testing.assert_close(ex.maps('attention_gradcam', layer=2), itm)


@pytest.mark.parametrize('part', ['maps_itm', 'maps_itc', 'last_batch_cross_attention_grad', 'picked_itm', 'iou_itc', 'accuracy_itm', 'upsampled_first_map_itm'])
def test_a_changed_number_is_named(part):
    config, weights, io = read_golden(FOLDER)
    io = named(NAME, io)
    key = f'out.{part}'
    wrong = io[key].clone()
    wrong.view(-1)[0] += 1e-4 if wrong.is_floating_point() else 1
    with pytest.raises(AssertionError, match=f'{key} differs'): judge(CHECKERS[NAME](config, weights, io), io | {key: wrong})


def test_another_layer_is_another_map():
    config, weights, io = read_golden(FOLDER)
    name = next(k for k in config['config'] if k.startswith('cross-attention layer index'))
    other = config | dict(config=config['config'] | {name: 2})
    with pytest.raises(AssertionError, match='out.maps_itm differs'): judge(gradcam_grounding(other, weights, named(NAME, io)), named(NAME, io))
