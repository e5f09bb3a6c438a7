"One attention: its twin, its oracles, and what must hold for any sizes and masks."
from threading import Barrier, Event, Thread
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from vl_tutor.primitives.attention import Attention, KVCache, Recording, attend, attend_ref, causal_keep, key_mask, record

few = settings(max_examples=25, deadline=None)
size = st.integers(1, 7)
seeds = st.integers(0, 2**31)


def close(got, want, atol=1e-6, rtol=1e-4): torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


def qkv(seed, b=2, h=2, n=5, m=5, d=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, rows, d, generator=g, dtype=torch.float64).to(dtype) for rows in (n, m, m)]


def random_keep(seed, *shape):
    "A mask in which every row may look somewhere"
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(*shape, generator=g) < .6
    keep[..., 0] |= ~keep.any(-1)
    return keep


def tokens(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the twin and the kernel ----

def by_hand(q, k, v, keep):
    "Scores, exponentials, average: numbers, no tensors"
    from math import exp, sqrt
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if keep[b, h, i, j]]
                points = [exp(float(q[b, h, i] @ k[b, h, j])/sqrt(q.shape[3])) for j in seen]
                out[b, h, i] = sum(p*v[b, h, j] for p, j in zip(points, seen))/sum(points)
    return out


@few
@given(seeds, size, size, size)
def test_twin_is_what_one_computes_by_hand(seed, n, m, d):
    q, k, v = qkv(seed, 1, 2, n, m, d, torch.float64)
    keep = random_keep(seed, 1, 2, n, m)
    out, weights = attend_ref(q, k, v, keep)
    close(out, by_hand(q, k, v, keep), atol=1e-12, rtol=1e-9)
    close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12)
    assert (weights[~keep] == 0).all()


@few
@given(seeds, size, size, size, st.sampled_from(['none', 'keys', 'table', 'heads']), st.booleans())
def test_kernel_agrees_with_twin(seed, n, extra, d, mask, causal):
    m = n + extra - 1
    q, k, v = qkv(seed, 2, 2, n, m, d)
    shape = dict(none=None, keys=(2, 1, 1, m), table=(2, 1, n, m), heads=(2, 2, n, m))[mask]
    keep = None if shape is None else random_keep(seed, *shape)
    seen = causal_keep(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
    both = seen.expand(2, 2, n, m) if keep is None else keep & seen
    close(attend(q, k, v, keep, causal), attend_ref(q, k, v, both)[0])


@pytest.mark.parametrize('dtype, atol', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize('masked', [False, True])
def test_kernel_in_every_precision(dtype, atol, masked):
    q, k, v = qkv(3, 2, 4, 17, 23, 16)
    keep = random_keep(3, 2, 1, 1, 23) if masked else None
    exact = attend_ref(q.double(), k.double(), v.double(), keep)[0]
    low = [t.to(dtype) for t in (q, k, v)]
    rounded = attend_ref(*(t.double() for t in low), keep)[0]
    close(attend(*low, keep).double(), rounded, atol=atol, rtol=1e-2 if dtype != torch.float32 else 1e-4)
    close(attend_ref(*low, keep)[0].double(), rounded, atol=2*atol, rtol=1e-2 if dtype != torch.float32 else 1e-4)
    close(rounded, exact, atol=.05, rtol=.1)


@pytest.mark.parametrize('causal', [False, True])
def test_gradients_agree_with_twin_and_with_differences(causal):
    q, k, v = (t.requires_grad_() for t in qkv(5, 1, 2, 3, 4, 2, torch.float64))
    keep = random_keep(5, 1, 1, 1, 4)
    both = keep & causal_keep(3, 4) if causal else keep
    assert torch.autograd.gradcheck(lambda *t: attend_ref(*t, both)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: attend(*t, keep, causal), (q, k, v))


@few
@given(st.integers(1, 9), st.integers(0, 9))
def test_causal_mask_is_aligned_at_the_end(n, extra):
    keep = causal_keep(n, n + extra)
    assert keep.tolist() == [[j <= i + extra for j in range(n + extra)] for i in range(n)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('form', [attend, lambda *a: attend_ref(*a)[0]], ids=['kernel', 'twin'])
def test_a_row_that_may_look_nowhere_averages_everything(form, dtype):
    q, k, v = (t.requires_grad_() for t in qkv(7, dtype=dtype))
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[0, :, 2] = False
    out = form(q, k, v, keep)
    close(out[0, :, 2], v[0].mean(1), atol=1e-6 if dtype != torch.bfloat16 else 1e-2)
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_kernel_keeps_no_table():
    def kept(f, n):
        sizes = {}
        def pack(t): sizes[t.data_ptr()] = t.numel(); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            f(*(torch.randn(1, 2, n, 8, requires_grad=True) for _ in 'qkv'))
        return sum(sizes.values())
    assert kept(attend, 512) == 4*kept(attend, 128)
    assert kept(attend_ref, 512) > 10*kept(attend_ref, 128)


# ---- the class and its oracles ----

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('causal', [False, True])
def test_self_attention_is_torchs(bias, masked, causal):
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True), Attention(12, 3, bias=bias, causal=causal)
    ours.to_qkv.weight.data, ours.to_out.weight.data = theirs.in_proj_weight.data, theirs.out_proj.weight.data
    if bias:
        for part in (theirs.in_proj_bias, theirs.out_proj.bias): nn.init.normal_(part)
        ours.to_qkv.bias.data, ours.to_out.bias.data = theirs.in_proj_bias.data, theirs.out_proj.bias.data
    x, keep = tokens(1, 3, 6, 12), torch.arange(6) < torch.tensor([6, 4, 1])[:, None] if masked else None
    want, weights = theirs(x, x, x, key_padding_mask=None if keep is None else ~keep, attn_mask=~causal_keep(6) if causal else None,
                           average_attn_weights=False)
    close(ours(x, keep=keep), want)
    with record(ours) as rec: close(ours(x, keep=keep), want)
    close(rec[''], weights)


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True), Attention(12, 3, dim_context=7)
    ours.to_q.weight.data, ours.to_kv.weight.data = theirs.q_proj_weight.data, torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]).data
    ours.to_q.bias.data, ours.to_kv.bias.data = theirs.in_proj_bias.data[:12], theirs.in_proj_bias.data[12:]
    ours.to_out.load_state_dict(theirs.out_proj.state_dict())
    x, context, keep = tokens(1, 2, 4, 12), tokens(2, 2, 9, 7), random_keep(3, 2, 9)
    close(ours(x, context, keep=keep), theirs(x, context, context, key_padding_mask=~keep)[0])


def test_inner_width_may_differ():
    narrow = Attention(12, 3, dim_head=2, dim_context=5, bias=False, out_bias=True)
    assert {k: tuple(v.shape) for k, v in narrow.state_dict().items()} == {
        'to_q.weight': (6, 12), 'to_kv.weight': (12, 5), 'to_out.weight': (12, 6), 'to_out.bias': (12,)}
    assert narrow(tokens(0, 2, 3, 12), tokens(1, 2, 4, 5)).shape == (2, 3, 12)


@pytest.mark.parametrize('kind', ['self', 'causal', 'cross', 'both', 'fp32'])
def test_gradcheck(kind):
    torch.manual_seed(0)
    make = dict(self=dict(), causal=dict(causal=True), cross=dict(dim_context=3), both=dict(dim_context=4), fp32=dict(softmax_fp32=True))
    part = Attention(4, 2, **make[kind]).double()
    x, context = tokens(1, 1, 3, 4).double().requires_grad_(), tokens(2, 1, 5, 3).double().requires_grad_()
    if kind == 'self': assert torch.autograd.gradcheck(lambda x: part(x, keep=torch.tensor([[True, True, False]])), x)
    elif kind == 'causal': assert torch.autograd.gradcheck(part, x)
    elif kind == 'cross': assert torch.autograd.gradcheck(part, (x, context))
    elif kind == 'both': assert torch.autograd.gradcheck(lambda x, i: part(x, torch.cat([i, x], 1)), (x, context.new_ones(1, 5, 4).requires_grad_()))
    else: assert torch.autograd.gradcheck(part, x, eps=1e-3, atol=1e-2, rtol=1e-2)      # the middle runs in float32


# ---- what must always hold ----

@few
@given(seeds, st.integers(2, 7), st.integers(1, 6))
def test_padding_never_matters(seed, n, real):
    real = min(real, n)
    torch.manual_seed(seed % 1000)
    part, x, keep = Attention(8, 2), tokens(seed, 2, n, 8), (torch.arange(n) < real).expand(2, n)
    garbage = torch.where(keep[..., None], x, 1e4)
    close(part(x, keep=keep)[:, :real], part(garbage, keep=keep)[:, :real])
    close(part(x, keep=keep)[:, :real], part(x[:, :real]), atol=2e-6)


@few
@given(seeds, st.integers(1, 6), st.integers(0, 5))
def test_the_future_never_matters(seed, n, i):
    i = min(i, n - 1)
    torch.manual_seed(seed % 1000)
    x = tokens(seed, 1, n, 8).requires_grad_()
    Attention(8, 2, causal=True)(x)[:, i].sum().backward()
    assert ((x.grad.abs().sum((0, 2)) > 0) == (torch.arange(n) <= i)).all()


@few
@given(seeds, st.integers(1, 7), st.randoms(use_true_random=False))
def test_order(seed, n, random):
    torch.manual_seed(seed % 1000)
    order = list(range(n)); random.shuffle(order)
    x, inputs = tokens(seed, 2, 4, 8), tokens(seed + 1, 2, n, 8)
    whole, read, keep = Attention(8, 2), Attention(8, 2, dim_context=8), random_keep(seed, 2, n)
    close(whole(inputs[:, order], keep=keep[:, order]), whole(inputs, keep=keep)[:, order])
    close(read(x, inputs[:, order], keep=keep[:, order]), read(x, inputs, keep=keep))


def test_every_kind_of_mask_means_the_same():
    part, x, keep = Attention(8, 2), tokens(0, 3, 5, 8), random_keep(1, 3, 5)
    want = part(x, keep=keep)
    for same in (keep[:, None].expand(3, 5, 5), keep[:, None, None], keep[:, None, None].expand(3, 2, 5, 5), keep.long(), keep.to(torch.uint8)):
        close(part(x, keep=same), want)


def test_context_of_inputs_and_latents():
    "Flamingo's resampler: keys from inputs and latents together, padding hidden in the inputs only"
    part, latents, inputs = Attention(8, 2, dim_context=8), tokens(0, 2, 3, 8), tokens(1, 2, 6, 8)
    keep = random_keep(2, 2, 6)
    longer = F.pad(keep, (0, 3), value=True)
    got = part(latents, torch.cat([inputs, latents], 1), keep=longer)
    for row in range(2):
        alone = torch.cat([inputs[row, keep[row]], latents[row]])[None]
        close(got[row], part(latents[row:row+1], alone)[0])


# ---- remembering ----

@few
@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_cached_is_uncached(seed, pieces, masked):
    torch.manual_seed(seed % 1000)
    part, n = Attention(8, 2, causal=True), sum(pieces)
    x, keep = tokens(seed, 2, n, 8), random_keep(seed, 2, n) if masked else None
    cache, got, start = KVCache(), [], 0
    for piece in pieces:
        stop = start + piece
        got.append(part(x[:, start:stop], cache=cache, keep=None if keep is None else keep[:, :stop]))
        start = stop
    assert cache.length == n
    real = torch.ones(2, n, dtype=torch.bool) if keep is None else keep.cumsum(1) > 0     # left padding itself sees nobody
    close(torch.cat(got, 1)[real], part(x, keep=keep)[real], atol=2e-6)


def test_cache_reorders_rows():
    part, x, cache = Attention(8, 2, causal=True), tokens(0, 3, 4, 8), KVCache()
    part(x, cache=cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    new = tokens(1, 3, 1, 8)
    close(part(new, cache=cache), part(torch.cat([x[rows], new], 1))[:, -1:])
    empty = KVCache()
    empty.reorder(rows)
    assert empty.length == 0


def test_cross_keys_are_made_once(monkeypatch):
    part, x, context, cache = Attention(8, 2, dim_context=5), tokens(0, 2, 3, 8), tokens(1, 2, 6, 5), KVCache()
    want, made = part(x, context, cache=cache), []
    part.to_kv.register_forward_hook(lambda *_: made.append(1))
    close(part(x, cache=cache), want)
    close(part(x[:, :1], cache=cache), want[:, :1])
    assert not made and cache.length == 6
    other = tokens(2, 2, 4, 5)
    close(part(x, other, cache=cache), part(x, other))
    assert cache.length == 4


# ---- watching ----

class Pair(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = Attention(8, 2), Attention(8, 2, causal=True, dropout=.3)
    def forward(self, x): return self.b(self.a(x))


def traces(model):
    "Everything a recording might leave behind"
    return [(name, part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks),
             getattr(part, 'recorder', None), part.forward.__func__) for name, part in model.named_modules()] + \
           [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()] + list(model.state_dict())


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('fails', [False, True])
def test_recording_leaves_no_trace(gradients, training, fails):
    model = Pair().train(training)
    model.a.to_out.requires_grad_(False)
    before = traces(model)
    try:
        with record(model, gradients):
            model(tokens(0, 1, 3, 8))
            if fails: raise KeyError('on purpose')
    except KeyError: pass
    assert traces(model) == before


def test_off_is_the_same_kernel_and_on_is_none(monkeypatch):
    import vl_tutor.primitives.attention as module
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, 'scaled_dot_product_attention', lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    model, x = Pair().eval(), tokens(0, 1, 3, 8)
    want = model(x)
    assert len(calls) == 2
    with record(model): close(model(x), want)
    assert len(calls) == 2
    assert torch.equal(model(x), want) and len(calls) == 4


def test_recording_reads_like_a_dictionary():
    model, x = Pair().eval(), tokens(0, 2, 3, 8)
    with record(model) as rec: model(x), model(2*x)
    assert list(rec) == ['a', 'b'] and len(rec) == 2 and len(rec.calls('a')) == 2
    assert torch.equal(rec['a'], rec.calls('a')[-1]) and not rec['a'].requires_grad
    close(rec['a'].sum(-1), torch.ones(2, 2, 3))
    assert (rec['b'].triu(1) == 0).all()
    with pytest.raises(ValueError, match=r"nothing recorded at 'c'; recorded: \['a', 'b'\]"): rec['c']
    with pytest.raises(ValueError, match="no gradient at 'a'"): rec.gradients('a')


def test_recorded_gradients_are_the_derivative():
    model, x = Pair().eval().double(), tokens(0, 1, 3, 8).double()
    with record(model, gradients=True) as rec: model(x)[0, 2].pow(2).sum().backward()
    weights = rec['b'].detach().requires_grad_()
    q, k, v = model.b.project(model.a(x))
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    grad, = torch.autograd.grad(model.b.to_out(mixed)[0, 2].pow(2).sum(), weights)
    close(rec.gradients('b'), grad, atol=1e-12)
    assert rec.gradients('a').abs().sum() > 0


def test_recordings_nest():
    model, x = Pair().eval(), tokens(0, 1, 3, 8)
    with record(model) as outer:
        with record(model.a) as inner: model(x)
        model(x)
    assert list(inner) == [''] and len(outer.calls('a')) == 1 and len(outer.calls('b')) == 2
    assert isinstance(outer, Recording)


@pytest.mark.parametrize('gradients', [False, True])
def test_two_threads_record_two_inputs_on_one_model(gradients):
    "Both are inside before either computes, and the one that came first leaves first"
    model, inputs, found, meet = Pair().eval(), [tokens(i, 1, 3 + i, 8) for i in range(2)], {}, Barrier(2, timeout=20)
    left = Event()
    def watch(i):
        if i: meet.wait()                                        # the second comes after the first
        with record(model, gradients) as rec:
            if not i: meet.wait()
            meet.wait()
            for _ in range(20): model(inputs[i])
            if i:
                assert left.wait(20)
                model(inputs[i])                                 # the first has gone, the second still records
        found[i] = rec
        if not i: left.set()
    threads = [Thread(target=watch, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(part.recorder is None for part in (model.a, model.b))
    for i, x in enumerate(inputs):
        with record(model) as alone: model(x)
        for path in 'ab':
            assert len(found[i].calls(path)) == 20 + i
            for w in found[i].calls(path): assert torch.equal(w, alone[path])


def test_who_does_not_record_is_not_recorded():
    model, x = Pair().eval(), tokens(0, 1, 3, 8)
    with record(model) as rec:
        t = Thread(target=model, args=(x,)); t.start(); t.join()
    assert not len(rec)


# ---- noise and precision ----

def test_dropout_only_in_training():
    part, x = Attention(8, 2, dropout=.5), tokens(0, 2, 6, 8)
    assert torch.equal(part.eval()(x), part(x))
    torch.manual_seed(0)
    assert not torch.equal(part.train()(x), part(x))
    with record(part) as rec: seen = part(x)
    close(rec[''].sum(-1), torch.ones(2, 2, 6))                      # what is recorded is before dropout
    assert not torch.equal(seen, part.eval()(x))


def test_dropout_keeps_the_average():
    torch.manual_seed(0)
    part = Attention(4, 1, dropout=.5)
    x, runs = tokens(0, 1, 4, 4), 3000
    with torch.no_grad():
        want = part.eval()(x)
        kernel = part.train()(x.expand(runs, 4, 4)).mean(0)
        with record(part): watched = part(x.expand(runs, 4, 4)).mean(0)
    close(kernel, want[0], atol=.05)
    close(watched, want[0], atol=.05)


@pytest.mark.parametrize('recorded', [False, True])
def test_softmax_in_32_bits_even_under_autocast(recorded):
    torch.manual_seed(0)
    part, x = Attention(16, 2, softmax_fp32=True), tokens(0, 2, 9, 16)*3
    with torch.autocast('cpu', torch.bfloat16):
        seen = []
        if recorded:
            with record(part) as rec: part(x)
            assert rec[''].dtype == torch.float32
            close(rec[''].sum(-1), torch.ones(2, 2, 9))
        kernel = part.mix
        part.mix = lambda q, k, v, keep: (seen.extend(t.dtype for t in (q, k, v)), kernel(q, k, v, keep))[1]
        part(x)
    assert seen == [torch.float32]*3


def test_half_precision_stays_close():
    torch.manual_seed(0)
    part, x = Attention(32, 4), tokens(0, 2, 20, 32)
    want = part(x)
    close(part.bfloat16()(x.bfloat16()).float(), want, atol=1e-2, rtol=.05)


def test_meta_device():
    with torch.device('meta'): part, x = Attention(8, 2, softmax_fp32=True, causal=True), torch.empty(2, 5, 8)
    assert part(x).shape == (2, 5, 8)


# ---- mistakes ----

@pytest.mark.parametrize('wrong, words', [
    (lambda: Attention(8, 3), 'dim=8 is not divisible by heads=3'),
    (lambda: Attention(8, 2)(torch.zeros(1, 3, 5)), r'reads \(b, n, 8\), not \(1, 3, 5\)'),
    (lambda: Attention(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), 'takes no context'),
    (lambda: Attention(8, 2, dim_context=4)(torch.zeros(1, 3, 8)), 'needs a context or a filled cache'),
    (lambda: Attention(8, 2, dim_context=4)(torch.zeros(1, 3, 8), cache=KVCache()), 'needs a context or a filled cache'),
    (lambda: Attention(8, 2, dim_context=4)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 5)), r'\(b, m, 4\), not \(1, 3, 5\)'),
    (lambda: Attention(8, 2)(torch.zeros(1, 3, 8), keep=torch.ones(1, 3)), 'a mask is bool, True = may look, not torch.float32'),
    (lambda: Attention(8, 2)(torch.zeros(1, 3, 8), keep=torch.ones(1, 4, dtype=torch.bool)), r'\(1, 4\) does not fit 3 keys'),
    (lambda: key_mask(torch.ones(3, dtype=torch.bool)), r'not \(3,\)'),
    (lambda: attend_ref(*qkv(0)[:1], torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 5, 3)), 'd=4 but keys have d=3'),
    (lambda: attend(*qkv(0)[:1], torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 5, 3)), 'd=4 but keys have d=3')])
def test_mistakes_are_named(wrong, words):
    with pytest.raises(ValueError, match=words): wrong()


# ---- off, nothing is paid for ----

def kernels(run):
    "Names of all operations of a call, in order"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad(): run()
    return [event.name for event in seen.events() if event.name.startswith('aten::')]


def test_off_runs_the_operations_of_an_attention_that_knows_no_recording():
    class Unwatched(Attention):
        def mix(self, q, k, v, keep): return attend(q, k, v, keep, self.causal, self.dropout if self.training else 0.)
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(12, 3), Attention(12, 3, causal=True, dropout=.1)), tokens(0, 2, 5, 12)
    off = kernels(lambda: model(x))
    with record(model): on = kernels(lambda: model(x))
    assert off == kernels(lambda: model(x)) != on and sum('scaled_dot_product' in name for name in on) == 0
    for part in model: part.__class__ = Unwatched
    assert kernels(lambda: model(x)) == off and sum(name == 'aten::scaled_dot_product_attention' for name in off) == 2
