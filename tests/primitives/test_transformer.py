"Blocks: the same numbers as four libraries, and what must hold at any depth."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from vl_tutor.primitives.attention import KVCache, record
from vl_tutor.primitives.transformer import ACTIVATIONS, Block, DropPath, FeedForward, Transformer

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)


def close(got, want, atol=2e-6, rtol=1e-4): torch.testing.assert_close(got, want, atol=atol, rtol=rtol)
def tokens(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stir(module):
    "Norms and biases away from one and zero, or a forgotten one would not show"
    torch.manual_seed(0)
    for p in module.parameters():
        if p.ndim == 1: nn.init.normal_(p, mean=.5)
    return module.eval()


# ---- activations and feed-forward ----

@pytest.mark.parametrize('ours, theirs', [('gelu', 'gelu'), ('gelu_tanh', 'gelu_new'), ('gelu_tanh', 'gelu_pytorch_tanh'), ('quick_gelu', 'quick_gelu'),
                                          ('relu', 'relu'), ('sqrelu', 'relu2'), ('tanh', 'tanh')])
def test_activations_are_transformers(ours, theirs):
    from transformers.activations import ACT2FN
    x = torch.linspace(-6, 6, 1001)
    close(ACTIVATIONS[ours](x), ACT2FN[theirs](x), atol=1e-6)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activation_gradients(name):
    x = tokens(0, 20).double().requires_grad_()
    assert torch.autograd.gradcheck(ACTIVATIONS[name], x)


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('bias', [True, False])
def test_feed_forward_is_two_layers(name, bias):
    part, x = FeedForward(6, 10, act=name, bias=bias), tokens(0, 2, 3, 6)
    close(part(x), F.linear(ACTIVATIONS[name](F.linear(x, part.up.weight, part.up.bias)), part.down.weight, part.down.bias))
    assert (part.up.bias is not None) == bias == (part.down.bias is not None)


# ---- noise ----

@few
@given(seeds, st.floats(0, .9))
def test_drop_path_skips_whole_samples_and_keeps_the_average(seed, rate):
    torch.manual_seed(seed)
    x = torch.ones(3000, 2, 3)
    y = DropPath(rate)(x)
    assert (y == y[:, :1, :1]).all()                                         # all of a sample, or nothing
    kept = y[:, 0, 0] != 0
    close(y[kept], x[kept]/(1 - rate))
    assert abs(y.mean().item() - 1) < 6*(rate/(1 - rate)/3000)**.5 + 1e-6    # six standard errors
    assert DropPath(rate).eval()(x) is x


def test_noise_is_off_at_test_time_and_on_in_training():
    noisy, plain = Transformer(3, 8, 2, dropout=.3, attn_dropout=.3, drop_path=.5, layer_drop=.5), Transformer(3, 8, 2)
    plain.load_state_dict(noisy.state_dict())
    x = tokens(0, 4, 5, 8)
    assert torch.equal(noisy.eval()(x), plain(x))
    torch.manual_seed(0)
    assert not torch.equal(noisy.train()(x), plain(x))


def test_every_kind_of_noise_reaches_its_place():
    x = tokens(0, 64, 5, 8)
    for noise in (dict(dropout=.5), dict(attn_dropout=.5), dict(drop_path=.5)):
        torch.manual_seed(0)
        block = Block(8, 2, **noise)
        assert not torch.equal(block(x), block.eval()(x)), noise
    block.train()                                                            # drop path: some samples pass a whole block untouched
    assert .05 < (block(x) == x).all(-1).all(-1).float().mean() < .6


def test_rates_grow_with_depth():
    assert [round(b.drop_path.rate, 6) for b in Transformer(5, 8, 2, drop_path=.4).blocks] == [0, .1, .2, .3, .4]
    assert [b.drop_path.rate for b in Transformer(1, 8, 2, drop_path=.4).blocks] == [0]


def test_every_argument_reaches_every_block():
    with torch.device('meta'):
        model = Transformer(3, 8, 2, hidden=5, dim_head=3, act='relu', norm='post', eps=.1, bias=False, causal=True, dropout=.2, attn_dropout=.3, drop_path=.4)
    for i, b in enumerate(model.blocks):
        assert (b.mlp.up.weight.shape, b.attn.to_out.weight.shape, b.mlp.up.bias, b.attn.to_qkv.bias) == ((5, 8), (8, 6), None, None)
        assert (b.mlp.act, b.pre, b.norm1.eps, b.norm2.eps, b.attn.causal) == (ACTIVATIONS['relu'], False, .1, .1, True)
        assert (b.dropout, b.mlp.dropout, b.attn.dropout, round(b.drop_path.rate, 6)) == (.2, .2, .3, [0, .2, .4][i])
        assert b.norm1.weight.is_meta


def test_layer_drop_skips_blocks_in_training_only():
    torch.manual_seed(0)
    model, x = Transformer(200, 4, 1, layer_drop=.3), tokens(0, 1, 2, 4)
    with record(model) as training: model(x)
    with record(model.eval()) as testing: model(x)
    assert 110 < len(training) < 170 and len(testing) == 200


# ---- the same numbers ----

def renamed(theirs, names, turn=()):
    return {f'{ours}.{kind}': t.T if name in turn and kind == 'weight' else t for name, ours in names.items() for kind in ('weight', 'bias')
            if (t := theirs.get(f'{name}.{kind}', theirs.get(f'{name}_{kind}'))) is not None}


@pytest.mark.parametrize('norm', ['pre', 'post'])
@pytest.mark.parametrize('act', ['relu', 'gelu'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('causal', [False, True])
def test_block_is_torchs(norm, act, bias, causal):
    theirs = stir(nn.TransformerEncoderLayer(12, 3, 20, 0., act, 1e-3, True, norm == 'pre', bias))
    ours = Block(12, 3, hidden=20, act=act, norm=norm, eps=1e-3, bias=bias, causal=causal)
    names = {'self_attn.in_proj': 'attn.to_qkv', 'self_attn.out_proj': 'attn.to_out', 'linear1': 'mlp.up', 'linear2': 'mlp.down', 'norm1': 'norm1', 'norm2': 'norm2'}
    ours.load_state_dict(renamed(theirs.state_dict(), names), strict=bias)   # torch leaves out the norms' biases too
    x, keep = tokens(1, 2, 6, 12), torch.tensor([[True]*6, [True]*4 + [False]*2])
    future = ~torch.ones(6, 6, dtype=torch.bool).tril() if causal else None
    with torch.enable_grad(): want = theirs(x.requires_grad_(), src_mask=future, src_key_padding_mask=~keep)
    close(ours(x, keep=keep)[keep], want[keep])


def gpt2_block():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    return stir(GPT2Block(GPT2Config(n_embd=12, n_head=3, attn_implementation='sdpa'), layer_idx=0))


def test_block_is_gpt2s():
    theirs, ours = gpt2_block(), Block(12, 3, act='gelu_tanh', causal=True)
    names = {'ln_1': 'norm1', 'ln_2': 'norm2', 'attn.c_attn': 'attn.to_qkv', 'attn.c_proj': 'attn.to_out', 'mlp.c_fc': 'mlp.up', 'mlp.c_proj': 'mlp.down'}
    ours.load_state_dict(renamed(theirs.state_dict(), names, turn=[n for n in names if '.c_' in n]))
    x = tokens(1, 2, 6, 12)
    want = theirs(x)
    close(ours(x), want)
    cache = KVCache()
    close(torch.cat([ours(x[:, :4], cache=cache), ours(x[:, 4:], cache=cache)], 1), want)


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_block_is_timms(qkv_bias):
    from timm.models.vision_transformer import Block as Theirs
    theirs = stir(Theirs(12, 3, qkv_bias=qkv_bias))
    ours = Block(12, 3, eps=theirs.norm1.eps)
    names = {'norm1': 'norm1', 'norm2': 'norm2', 'attn.qkv': 'attn.to_qkv', 'attn.proj': 'attn.to_out', 'mlp.fc1': 'mlp.up', 'mlp.fc2': 'mlp.down'}
    if not qkv_bias: nn.init.zeros_(ours.attn.to_qkv.bias)
    ours.load_state_dict(renamed(theirs.state_dict(), names), strict=qkv_bias)
    x = tokens(1, 2, 6, 12)
    close(ours(x), theirs(x))


def test_block_is_clips():
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer
    theirs = stir(CLIPEncoderLayer(CLIPVisionConfig(hidden_size=12, intermediate_size=20, num_attention_heads=3, attn_implementation='sdpa')))
    ours, state = Block(12, 3, hidden=20, act='quick_gelu'), theirs.state_dict()
    names = {'layer_norm1': 'norm1', 'layer_norm2': 'norm2', 'self_attn.out_proj': 'attn.to_out', 'mlp.fc1': 'mlp.up', 'mlp.fc2': 'mlp.down'}
    stacked = {f'attn.to_qkv.{kind}': torch.cat([state[f'self_attn.{which}_proj.{kind}'] for which in 'qkv']) for kind in ('weight', 'bias')}
    ours.load_state_dict({**renamed(state, names), **stacked})
    x = tokens(1, 2, 6, 12)
    want = theirs(x, attention_mask=None)
    close(ours(x), want if isinstance(want, torch.Tensor) else want[0])


def test_eps_and_activation_are_not_decoration():
    right, x = Block(12, 3, eps=1e-6), .01*tokens(0, 2, 6, 12)
    for wrong in (Block(12, 3, eps=1e-5), Block(12, 3, eps=1e-6, act='gelu_tanh'), Block(12, 3, eps=1e-6, norm='post')):
        wrong.load_state_dict(right.state_dict())
        assert (wrong(x) - right(x)).abs().max() > 1e-5


# ---- what must always hold ----

@few
@given(seeds, st.sampled_from(['pre', 'post']), st.integers(1, 6))
def test_padding_never_matters(seed, norm, real):
    torch.manual_seed(seed % 1000)
    model, x, keep = Transformer(2, 8, 2, norm=norm), tokens(seed, 2, 6, 8), (torch.arange(6) < real).expand(2, 6)
    garbage = torch.where(keep[..., None], x, 1e3)
    close(model(x, keep=keep)[:, :real], model(garbage, keep=keep)[:, :real], atol=1e-5)
    close(model(x, keep=keep)[:, :real], model(x[:, :real]), atol=1e-5)


@few
@given(seeds, st.sampled_from(['pre', 'post']), st.integers(0, 5))
def test_the_future_never_matters(seed, norm, i):
    torch.manual_seed(seed % 1000)
    x, weigh = tokens(seed, 1, 6, 8).requires_grad_(), tokens(seed + 1, 8)   # a plain sum of a normed token has no gradient
    (Transformer(3, 8, 2, norm=norm, causal=True)(x)[:, i]*weigh).sum().backward()
    assert ((x.grad.abs().sum((0, 2)) > 0) == (torch.arange(6) <= i)).all()


@few
@given(seeds, st.sampled_from(['pre', 'post']), st.permutations(range(6)))
def test_order_moves_through(seed, norm, order):
    torch.manual_seed(seed % 1000)
    model, x = Transformer(2, 8, 2, norm=norm), tokens(seed, 2, 6, 8)
    close(model(x[:, order]), model(x)[:, order], atol=1e-5)


@few
@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(['pre', 'post']))
def test_cached_is_uncached(seed, pieces, norm):
    torch.manual_seed(seed % 1000)
    model, x = Transformer(2, 8, 2, causal=True, norm=norm), tokens(seed, 2, sum(pieces), 8)
    caches = [KVCache() for _ in model.blocks]
    close(torch.cat([model(piece, caches=caches) for piece in x.split(pieces, 1)], 1), model(x), atol=1e-5)


@pytest.mark.parametrize('norm', ['pre', 'post'])
@pytest.mark.parametrize('causal', [False, True])
def test_gradcheck(norm, causal):
    torch.manual_seed(0)
    block, x = Block(4, 2, hidden=6, norm=norm, causal=causal).double(), tokens(0, 1, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, keep=torch.tensor([[True, True, False]])), x)


def test_watched_or_not_the_numbers_agree():
    model, x = Transformer(3, 16, 4, causal=True), tokens(0, 2, 7, 16)
    with record(model) as rec: close(model(x), model(x))
    with record(model) as rec: watched = model(x)
    close(watched, model(x), atol=1e-5)
    assert list(rec) == [f'blocks.{i}.attn' for i in range(3)]


def test_half_precision_stays_close():
    torch.manual_seed(0)
    model, x = Transformer(2, 32, 4), tokens(0, 2, 9, 32)
    want = model(x)
    close(model.bfloat16()(x.bfloat16()).float(), want, atol=.05, rtol=.05)


def test_pre_norm_without_branches_is_the_identity():
    block, x = Block(8, 2), tokens(0, 2, 5, 8)
    for part in (block.attn.to_out, block.mlp.down): nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    assert torch.equal(block(x), x)
    assert torch.equal(Transformer(0, 8, 2)(x), x)


@pytest.mark.parametrize('d, heads', [(8, 1), (12, 3), (64, 4)])
def test_weights_are_counted(d, heads): assert sum(p.numel() for p in Block(d, heads).parameters()) == 12*d*d + 13*d


# ---- mistakes ----

@pytest.mark.parametrize('wrong, words', [
    (lambda: FeedForward(4, 8, act='swish'), "no activation 'swish'; known: gelu, gelu_tanh, quick_gelu"),
    (lambda: Block(8, 2, norm='both'), "'pre' or 'post', not 'both'"),
    (lambda: Transformer(2, 8, 3), 'dim=8 is not divisible by heads=3'),
    (lambda: DropPath(1.), 'below 1, not 1.0'),
    (lambda: DropPath(-.1), 'below 1, not -0.1'),
    (lambda: Block(8, 2)(torch.zeros(1, 3, 8), keep=torch.ones(1, 2, dtype=torch.bool)), r'\(1, 2\) does not fit 3 keys')])
def test_mistakes_are_named(wrong, words):
    with pytest.raises(ValueError, match=words): wrong()
