"Grad-CAM: loops that say the same, pytorch-grad-cam and Captum as oracles, boxes ranked by their heat."
import copy
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings, strategies as st
from torch import nn
from vl_tutor.data.boxes import iou_inclusive
from vl_tutor.explain.gradcam import (accuracy_by_split, attention_gradcam, box_scores, gradcam, gradcam_ref, ground, itc_gradcam, itm_gradcam, pick_box,
                                      upsampled)
from vl_tutor.explain.one_call import explain, gradients, record_tokens
from vl_tutor.primitives.notation import expect_fail
from vl_tutor.recipes.vlc import load_vlc
from vl_tutor.world.scenes import World

TEXT = 'a small red star'
sizes, seeds = st.integers(1, 4), st.integers(0, 10**6)


def drawn(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def tool(): return load_vlc()


@pytest.fixture(scope='module')
def picture():
    world = World('pair', 'test', skin='mixed')
    return world.draw(world.scenes(torch.tensor([1])))[0]


class Matcher(nn.Module):
    "What other libraries want: pixels in, scores out"
    def __init__(self, model, ids, mask):
        super().__init__()
        self.model, self.ids, self.mask = model, ids, mask

    def forward(self, pictures): return self.model.match(pictures, self.ids, self.mask)


# ---- on tokens ----

@given(t=sizes, p=sizes, d=sizes, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_gradcam_is_the_papers_sums(t, p, d, seed):
    tokens, slopes = drawn(seed, 2, t, p, d)
    torch.testing.assert_close(gradcam(tokens, slopes), gradcam_ref(tokens, slopes), atol=1e-6, rtol=1e-5)


def same_as_theirs(theirs, ours, side):
    "Equal after their scaling, which stretches twice from 0 to 1"
    from pytorch_grad_cam.utils.image import scale_cam_image
    theirs = torch.from_numpy(theirs)
    scaled = torch.from_numpy(scale_cam_image(scale_cam_image(ours.detach().numpy(), (side, side))))
    assert theirs.std() > .05 and torch.corrcoef(torch.stack([scaled.flatten(), theirs.flatten()]))[0, 1] > .999
    torch.testing.assert_close(scaled, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize('block', [0, 2])
def test_pytorch_grad_cam_on_a_vit_of_timm(block):
    import timm
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=48, patch_size=8, depth=3, num_classes=7).eval()
    pictures, classes, path = torch.randn(3, 3, 48, 48), [1, 6, 4], f'blocks.{block}.norm1'
    with GradCAM(model, [model.get_submodule(path)], reshape_transform=lambda x: rearrange(x[:, 1:], 'b (r c) d -> b d r c', r=6)) as cam:
        theirs = cam(pictures, [ClassifierOutputTarget(c) for c in classes])
    with record_tokens(model, [path]) as seen: scores = model(pictures)[range(3), classes]
    tokens = seen[path][0]
    slopes, = gradients(scores.sum()[None], [tokens])
    same_as_theirs(theirs, gradcam(tokens[:, 1:], slopes[0, :, 1:]).unflatten(1, (6, 6)), 48)


@pytest.mark.parametrize('layer', [0, 2, 5])
def test_pytorch_grad_cam_on_vlc(tool, picture, layer):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model = copy.deepcopy(tool.model)
    matcher = Matcher(model, *tool.texts([TEXT]))
    with GradCAM(matcher, [model.trunk.encoder.blocks[layer].norm1], reshape_transform=lambda x: rearrange(x[:, -36:], 'b (r c) d -> b d r c', r=6)) as cam:
        theirs = cam(tool.images([picture]), [ClassifierOutputTarget(1)])
    same_as_theirs(theirs, explain(tool, picture, TEXT, 'match').maps('gradcam', layer=layer)[:1], 48)


class Turned(nn.Module):
    "Tokens as channels, since Captum averages over what follows the channels"
    def forward(self, x): return x.mT


def test_captum_layer_grad_cam(tool, picture):
    from captum.attr import LayerGradCam
    model = copy.deepcopy(tool.model)
    block, turned = model.trunk.encoder.blocks[3], Turned()
    block.norm1 = nn.Sequential(block.norm1, turned, Turned())
    theirs = LayerGradCam(Matcher(model, *tool.texts([TEXT])), turned).attribute(tool.images([picture]), target=1, relu_attributions=True)[:, 0]
    ex = explain(tool, picture, TEXT, 'match')
    assert theirs.max() > 0
    torch.testing.assert_close(gradcam(ex.tokens[3].detach(), ex.slope('tokens', 3)), theirs.detach(), atol=1e-6, rtol=1e-4)


# ---- on attention ----

class SpelledOut(nn.Module):
    "Our attention with its softmax as a module of its own, which Captum can watch"
    def __init__(self, ours):
        super().__init__()
        self.ours, self.softmax = ours, nn.Softmax(-1)

    def forward(self, x, *, keep=None, cache=None):
        q, k, v = self.ours.project(x)
        score = q @ k.mT*q.shape[-1]**-.5
        if keep is not None: score = score.masked_fill(~keep[:, None, None], torch.finfo(score.dtype).min)
        return self.ours.to_out(rearrange(self.softmax(score) @ v, 'b h n d -> b n (h d)'))


@pytest.mark.parametrize('layer', [0, 1, 4])
def test_captum_gradient_times_attention(tool, picture, layer):
    from captum.attr import LayerGradientXActivation
    model = copy.deepcopy(tool.model)
    block = model.trunk.encoder.blocks[layer]
    block.attn = SpelledOut(block.attn)
    matcher = Matcher(model, *tool.texts([TEXT]))
    theirs = LayerGradientXActivation(matcher, block.attn.softmax).attribute(tool.images([picture]), target=1).detach()     # (1 h n m)
    ex = explain(tool, picture, TEXT, 'match')
    torch.testing.assert_close(ex.weights[layer].detach()*ex.slope('weights', layer), theirs, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(ex.table('attention_gradcam', layer), theirs.relu().mean(1), atol=1e-7, rtol=1e-3)      # no weight is negative


def itm_by_loops(weights, slopes, mask, grid):
    b, h, n, _ = weights.shape
    out = torch.zeros(b, *grid)
    for i in range(b):
        for row in range(grid[0]):
            for col in range(grid[1]):
                at = 1 + row*grid[1] + col
                kept = [weights[i, k, j, at]*max(slopes[i, k, j, at].item(), 0) for k in range(h) for j in range(n) if mask[i, j]]
                out[i, row, col] = sum(kept)/h/n
    return out


@given(b=sizes, h=sizes, n=sizes, rows=sizes, cols=sizes, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_itm_gradcam_is_four_loops(b, h, n, rows, cols, seed):
    weights, slopes = drawn(seed, b, h, n, 1 + rows*cols).softmax(-1), drawn(seed + 1, b, h, n, 1 + rows*cols)
    mask = torch.arange(n) < torch.randint(1, n + 1, (b, 1), generator=torch.Generator().manual_seed(seed))
    got = itm_gradcam(weights, slopes, mask, (rows, cols))
    torch.testing.assert_close(got, itm_by_loops(weights, slopes, mask, (rows, cols)))
    assert (got >= 0).all()
    loud = torch.where(mask[:, None, :, None], slopes, 1e3)                              # what padding says is not heard
    assert torch.equal(itm_gradcam(weights, loud, mask, (rows, cols)), got)
    longer = [torch.cat([x, x], 2) for x in (weights, slopes)]                           # twice as many places, half of them padding
    half = itm_gradcam(*longer, torch.cat([mask, torch.zeros_like(mask)], 1), (rows, cols))
    torch.testing.assert_close(2*half, got)


@pytest.mark.parametrize('target', ['match', 'rank'])
def test_explain_and_itm_gradcam_agree_on_vlc(tool, picture, target):
    ex = explain(tool, picture, TEXT, target)
    (_, words), (_, cls) = ex.layout.spans('text')[0], ex.layout.spans('cls')[0]
    cut = lambda x: x[:, :, words.start:words.stop, cls.start:]
    for k in range(len(ex.looks)):
        made = itm_gradcam(cut(ex.weights[k].detach()), cut(ex.slope('weights', k)), torch.ones(1, words.stop, dtype=torch.bool), (6, 6))
        assert made.max() > 0
        torch.testing.assert_close(ex.maps('attention_gradcam', layer=k)[:1], made)


def test_itc_gradcam_reads_the_class_row_only():
    weights, slopes = drawn(0, 2, 3, 7, 7).softmax(-1), drawn(1, 2, 3, 7, 7)
    got = itc_gradcam(weights, slopes, (2, 3))
    torch.testing.assert_close(got, attention_gradcam(weights, slopes)[:, 0, 1:].unflatten(1, (2, 3)))
    slopes[:, :, 1:], slopes[..., 0] = 9., 9.
    assert torch.equal(itc_gradcam(weights, slopes, (2, 3)), got)


def test_wrong_shapes_are_named():
    weights, mask = torch.rand(1, 2, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    with expect_fail(contains='5 keys are not a class token and 2×3 patches'): itm_gradcam(weights, weights, mask, (2, 3))
    with expect_fail(contains='the words are (1, 3)'): itm_gradcam(weights, weights, mask[:, :2], (2, 2))


# ---- pixels and boxes ----

def test_upsampling_keeps_flat_maps_and_sides():
    maps = drawn(0, 2, 3, 4).abs()
    large = upsampled(maps, 31, 17)
    assert large.shape == (2, 31, 17)
    torch.testing.assert_close(upsampled(maps.flip(2), 31, 17), large.flip(2))
    torch.testing.assert_close(upsampled(torch.full((1, 3, 4), .7), 31, 17), torch.full((1, 31, 17), .7))
    spot = torch.zeros(1, 5, 5)
    spot[0, 2, 2] = 1
    assert upsampled(spot, 50, 50).min() < -.01                                         # bicubic, not linear


def score_by_pixels(heat, box, exponent):
    x, y, w, h = box
    pixels = [heat[r, c].item() for r in range(heat.shape[0]) for c in range(heat.shape[1]) if int(y) <= r < int(y + h) and int(x) <= c < int(x + w)]
    return sum(pixels)/(w*h)**exponent


@given(seed=seeds, exponent=st.sampled_from([0., .5, 1.]))
@settings(max_examples=20, deadline=None)
def test_box_scores_are_sums_of_pixels(seed, exponent):
    heat, gen = drawn(seed, 9, 12), torch.Generator().manual_seed(seed)
    boxes = torch.cat([torch.rand(5, 2, generator=gen)*14 - 3, .5 + torch.rand(5, 2, generator=gen)*9], 1)      # some stick out at every side
    want = [score_by_pixels(heat, box, exponent) for box in boxes.tolist()]
    torch.testing.assert_close(box_scores(heat, boxes, exponent=exponent), torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_the_root_of_the_area_prefers_the_tight_box():
    heat = torch.zeros(20, 20)
    heat[5:11, 5:11] = 1
    boxes = torch.tensor([[0., 0, 20, 20], [5, 5, 6, 6], [7, 7, 2, 2]])
    assert [pick_box(heat, boxes[order], exponent=.5) for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1])] == [1, 0, 2]
    assert pick_box(heat*torch.linspace(1, 1.1, 20), boxes, exponent=1.) != 0


def test_a_picture_without_heat():
    maps, offered = torch.zeros(3, 2, 2), [torch.tensor([[0., 0, 5, 5], [4, 4, 5, 5]]) + k for k in range(3)]
    maps[0, 1, 1] = 1
    wh = [(10, 10)]*3
    picked, boxes = ground(maps, offered, wh)
    assert picked == [1, 0, 0] and torch.equal(boxes[1], offered[1][0])                  # the first of equals
    picked, boxes = ground(maps, offered, wh, official=True)
    assert picked == [1, 1, 1] and all(torch.equal(b, offered[0][1]) for b in boxes)     # quirk O5: the box of the first picture
    with expect_fail(contains='no earlier one to keep'): ground(maps[1:], offered[1:], wh[1:], official=True)
    with expect_fail(contains='no boxes'): ground(maps[:1], [offered[0][:0]], wh[:1])


def test_sizes_are_width_then_height():
    maps = torch.zeros(1, 2, 2)
    maps[0, 0, 1] = 1                                                                    # top right
    offered = [torch.tensor([[20., 0, 20, 5], [0, 5, 20, 5], [0, 0, 20, 5]])]
    assert ground(maps, offered, [(40, 10)])[0] == [0]
    with pytest.raises(ValueError): ground(maps, offered, [(40, 10)]*2)


def test_accuracy_of_each_split():
    guesses = torch.tensor([[0., 0, 10, 10]]*4)
    truth = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [30, 30, 5, 5]])
    assert iou_inclusive(guesses, truth).tolist()[1] == .5
    assert accuracy_by_split(guesses, truth, [2, 0, 0, 0]) == {2: 1., 0: 1/3}
    assert accuracy_by_split(guesses, truth, ['all']*4, least=.4) == {'all': .75}


@pytest.mark.parametrize('official', [False, True])
def test_a_box_without_area_is_never_chosen(official):
    heat, boxes = torch.ones(4, 4), torch.tensor([[0., 0, 0, 2], [1, 1, 2, 2], [0, 0, 0, 0]])
    assert pick_box(heat, boxes, official=official) == 1
