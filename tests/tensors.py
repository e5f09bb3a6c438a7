"How tests shake models and compare tensors"
import torch
from vl_tutor.models.parity import first_difference


def shake(model, seed=1):
    "Random numbers in every trained tensor, norms and biases included"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.2*torch.randn(p.shape, generator=gen))
    return model.eval()


def near(ours, theirs, atol=1e-5):
    "Fails with the first place that differs"
    assert (found := first_difference(dict(tensor=ours), dict(tensor=theirs), atol=atol)) is None, str(found)


def same(a, b):
    "Whether two tensors, or two dicts of them, hold the same numbers to the last bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
