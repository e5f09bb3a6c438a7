"Transport against a linear programme, its slow twin, closed forms, and what must not matter."
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import tensor
from vl_tutor.training.transport import (align_cost, heat_maps, left_out, log_plan, released_plan, stand_out, transport_distance, transport_plan,
                                         transport_plan_ref, word_patch_loss)

torch.set_num_threads(1)


def draw(seed: int, b=4, n=7, p=11, d=6, dtype=torch.float32):
    "Random words and patches, every text of another length"
    dice = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(b, k, d, generator=dice, dtype=dtype) for k in (n, p))
    mask = torch.arange(n) < torch.randint(3, n + 1, (b, 1), generator=dice)
    return text, image, mask

def costs(seed: int, **sizes):
    text, image, mask = draw(seed, **sizes)
    pads = left_out(mask, image)
    return align_cost(text, image, *pads), pads

def exact(cost):
    "The least cost of all plans, by a general solver"
    (n, p), x = cost.shape, cost.double().numpy()
    sums = np.concatenate([np.kron(np.eye(n), np.ones(p)), np.kron(np.ones(n), np.eye(p))])
    return linprog(x.ravel(), A_eq=sums, b_eq=[1/n]*n + [1/p]*p).fun


# ---- plans ----

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('solve', (released_plan, log_plan, transport_plan))
def test_a_batch_is_its_pairs_one_by_one(seed, solve):
    cost, (text_pad, image_pad) = costs(seed)
    for beta, steps in ((.5, 50), (1., 3)):
        for plan, c, t, i in zip(solve(cost, text_pad, image_pad, beta=beta, steps=steps), cost, text_pad, image_pad):
            torch.testing.assert_close(plan[~i][:, ~t], transport_plan_ref(c[~t][:, ~i], beta=beta, steps=steps), atol=1e-6, rtol=1e-4)
            assert not plan[i].any() and not plan[:, t].any()

@pytest.mark.parametrize('seed', range(6))
def test_many_rounds_reach_the_linear_programme(seed):
    cost, pads = costs(seed, b=1, n=6, p=6, d=3, dtype=torch.float64)
    real = cost[0][~pads[0][0]][:, ~pads[1][0]]
    plan = log_plan(cost, *pads, beta=.05, steps=1500)
    assert abs(transport_distance(cost, plan).item() - exact(real)) < 1e-4

@pytest.mark.parametrize('beta', (.1, .5, 2.))
def test_every_step_size_has_the_same_limit(beta):
    cost, pads = costs(0, b=1, n=5, p=6, d=3, dtype=torch.float64)
    assert abs(transport_distance(cost, log_plan(cost, *pads, beta=beta, steps=2500)).item() - exact(cost[0][~pads[0][0]][:, ~pads[1][0]])) < 1e-3

def test_sums_are_those_of_a_plan():
    cost, (text_pad, image_pad) = costs(1)
    plan = transport_plan(cost, text_pad, image_pad, steps=2000)
    torch.testing.assert_close(plan.sum(1), torch.where(text_pad, 0., 1/(~text_pad).sum(1, keepdim=True)), atol=1e-5, rtol=0.)
    torch.testing.assert_close(plan.sum(2), torch.where(image_pad, 0., 1/(~image_pad).sum(1, keepdim=True)), atol=1e-3, rtol=0.)

def test_order_does_not_matter():
    cost, (text_pad, image_pad) = costs(2)
    rows, cols = torch.randperm(cost.shape[1]), torch.randperm(cost.shape[2])
    plan, moved = transport_plan(cost, text_pad, image_pad), transport_plan(cost[:, rows][:, :, cols], text_pad[:, rows], image_pad[:, cols])
    torch.testing.assert_close(moved, plan[:, cols][:, :, rows], atol=1e-6, rtol=1e-4)

def test_more_padding_changes_nothing():
    text, image, mask = draw(3)
    one = word_patch_loss(text, image, mask, tensor([1, 0, 1, 0]))
    wider = torch.cat([text, torch.randn(4, 5, 6)], 1), torch.cat([image, torch.randn(4, 2, 6)], 1)
    keep = torch.arange(13).expand(4, -1) < 11
    more = word_patch_loss(*wider, torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1), tensor([1, 0, 1, 0]), image_keep=keep)
    torch.testing.assert_close(one, more, atol=1e-6, rtol=1e-5)


# ---- when numbers run out ----

def opposed():
    "Three words, 36 patches: one word is at home in nine of them, the others nowhere; plain numbers lose the way"
    cost = torch.full((1, 5, 37), 1.)
    cost[0, 1, 1:10], cost[0, 1, 10:], cost[0, 2, 1:10] = 0., 2., 2.
    return cost, (tensor([[True, False, False, False, True]]), tensor([[True] + [False]*36]))

def test_logarithms_do_not_overflow():
    cost, pads = opposed()
    assert released_plan(cost, *pads, beta=.1, steps=1000).isnan().any()
    for plan in (log_plan(cost, *pads, beta=.1, steps=1000), transport_plan(cost, *pads, beta=.1, steps=1000)):
        torch.testing.assert_close(plan.sum(1)[0, 1:-1], torch.full((3,), 1/3), atol=1e-4, rtol=0.)
        assert abs(transport_distance(cost, plan).item() - exact(cost[0, 1:-1, 1:])) < 1e-3

def test_only_lost_pairs_are_solved_again():
    cost, pads = opposed()
    easy = torch.rand(1, 5, 37)
    both = transport_plan(torch.cat([easy, cost]), *(torch.cat([p, p]) for p in pads), beta=.1, steps=1000)
    assert torch.equal(both[:1], released_plan(easy, *pads, beta=.1, steps=1000)) and both.isfinite().all()

def test_a_step_has_a_size():
    cost, pads = opposed()
    with pytest.raises(ValueError, match='beta is above 0, not -1'): transport_plan(cost, *pads, beta=-1)


# ---- the loss ----

def test_the_gradient_is_the_plan():
    cost, pads = costs(4)
    plan = transport_plan(cost, *pads)
    cost.requires_grad_()
    transport_distance(cost, plan).sum().backward()
    torch.testing.assert_close(cost.grad, plan.mT)

def test_loss_by_its_parts():
    text, image, mask = draw(5)
    pads = left_out(mask, image)
    cost = align_cost(text, image, *pads)
    d = transport_distance(cost, transport_plan(cost, *pads))
    torch.testing.assert_close(word_patch_loss(text, image, mask, tensor([1, 0, 0, 1])), .1*(d[0] + d[3] - d[1] - d[2])/4)
    torch.testing.assert_close(word_patch_loss(text, image, mask, torch.ones(4, dtype=torch.bool), weight=2.), 2*d.mean())

@pytest.mark.parametrize('real', (0, 1, 2))
def test_a_text_without_words_is_nowhere(real):
    text, image, _ = draw(6, b=2)
    text.requires_grad_()
    loss = word_patch_loss(text, image, (torch.arange(7) < real).expand(2, -1), tensor([1, 1]))
    loss.backward()
    assert loss == 0 and not text.grad.any()

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_precision_is_widened(dtype):
    text, image, mask = draw(7)
    exact, halved = (word_patch_loss(t.float(), i.float(), mask, tensor([1, 0, 1, 0])) for t, i in ((text.to(dtype), image.to(dtype)), (text, image)))
    assert word_patch_loss(text.to(dtype), image.to(dtype), mask, tensor([1, 0, 1, 0])).dtype == torch.float32
    torch.testing.assert_close(exact, halved, atol=2e-3, rtol=.1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(word_patch_loss(text, image, mask, tensor([1, 0, 1, 0])), halved)

def test_a_mask_fits_its_pictures():
    with pytest.raises(ValueError, match=r'\(2, 5\) is no mask \(b, n\) for 3 pictures'): left_out(torch.ones(2, 5), torch.zeros(3, 5, 2))


# ---- maps ----

def test_a_planted_alignment_is_found():
    "Nine patches in three directions, three words in the same ones"
    axes = torch.eye(4)
    text = axes[[3, 0, 1, 2, 3]][None]
    owner = tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    maps = heat_maps(text, torch.cat([axes[3:], axes[owner]])[None], torch.ones(1, 5), (3, 3), steps=200)
    assert maps.shape == (1, 5, 3, 3) and 0 <= maps.min() and maps.max() <= 1 and not maps[0, [0, 4]].any()
    for word in range(3): assert set(maps[0, word + 1].flatten().nonzero()[:, 0].tolist()) == set((owner == word).nonzero()[:, 0].tolist())

def test_maps_grow_to_pixels():
    text, image, mask = draw(8, p=7)
    small, large = (heat_maps(text, image, mask, (2, 3), steps=20, patch=patch) for patch in (1, 4))
    assert large.shape == (4, 7, 8, 12) and torch.equal(large[:, :, ::4, ::4], small) and torch.equal(large[:, :, 3::4, 2::4], small)

def test_published_maps_are_the_same_where_they_are_numbers():
    text, image, mask = draw(9, p=10, d=32)
    a, b = (heat_maps(text, image, mask, (3, 3), steps=30, published=p) for p in (False, True))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0.)

def test_standing_out():
    assert not stand_out(torch.full((2, 5), .3)).any() and not stand_out(torch.ones(1, 1)).any()
    level = stand_out(tensor([0., 0, 0, 0, 0, 0, 0, 1, 2]))
    assert level[-1] == 1 and 0 <= level[-2] < 1 and not level[:7].any()

def test_a_map_has_a_place_for_every_patch():
    with pytest.raises(ValueError, match='2 × 2 patches are not 11 tokens'): heat_maps(*draw(0), (2, 2))
