"Decoding against transformers' generate, the authors' stored runs, exhaustive search, slow twins, and properties."
import itertools, json, os
from pathlib import Path
import numpy as np
import pytest
import torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from vl_tutor.models.backbones import GPT2, GPTConfig
from vl_tutor.training.decoding import (beam, beam_ref, cut_probs, draw, greedy, published_beam, published_nucleus, published_probs, sample)

GOLDEN = Path(os.environ.get('VL_TUTOR_GOLDEN', Path(__file__).resolve().parents[1]/'golden'))/'captioner'/'decoding'
EOS, VOCAB = 2, 19


# ---- transformers' generate is the oracle ----

def pair(seed: int, vocab: int=VOCAB, sharp: float=4.):
    "The same random GPT-2 twice: transformers' and ours; `sharp` spreads the logits so that nothing is nearly tied"
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab, n_positions=48, n_embd=24, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=EOS, initializer_range=.3)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad(): theirs.transformer.ln_f.weight.mul_(sharp/4)
    theirs.generation_config.pad_token_id = EOS
    return theirs, copied(theirs)

def copied(theirs) -> GPT2:
    "Our GPT-2 with those weights, written out by hand so that this test needs no key map"
    c = theirs.config
    ours = GPT2(GPTConfig(c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head, 4*c.n_embd)).eval()
    body, named = theirs.transformer, {}
    for i, layer in enumerate(body.h):
        for mine, part, turn in (('norm1', layer.ln_1, False), ('norm2', layer.ln_2, False), ('attn.to_qkv', layer.attn.c_attn, True),
                                 ('attn.to_out', layer.attn.c_proj, True), ('mlp.up', layer.mlp.c_fc, True), ('mlp.down', layer.mlp.c_proj, True)):
            named[f'decoder.blocks.{i}.{mine}.weight'] = part.weight.T if turn else part.weight
            named[f'decoder.blocks.{i}.{mine}.bias'] = part.bias
    named |= {'words.weight': body.wte.weight, 'places.weight': body.wpe.weight, 'norm_out.weight': body.ln_f.weight, 'norm_out.bias': body.ln_f.bias}
    ours.load_state_dict(named)
    return ours

def prompts(seed, batch, n=3): return torch.randint(3, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('batch', (1, 2, 4))
def test_greedy_is_generate(seed, batch):
    theirs, ours = pair(seed)
    ids = prompts(seed, batch)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14)
    got = greedy(ours.step, ours.new_cache(), prompt=ids, eos_id=EOS, max_len=14)
    assert torch.equal(got.ids, want)
    with torch.no_grad(): each = theirs(want).logits.log_softmax(-1)[:, ids.shape[1] - 1:-1].gather(2, want[:, ids.shape[1]:, None])[..., 0]
    for row, n, score in zip(each, got.lengths, got.scores): torch.testing.assert_close(row[:n].sum(), score, atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('early', (False, True, 'never'))
def test_beams_are_generates(seed, early):
    theirs, ours = pair(seed)
    batch, width, results, penalty = (1, 2, 3, 4)[seed%4], (1, 2, 4)[seed%3], 1 + seed%2, (.5, 1., 2., 0., -1.)[seed%5]
    ids, results = prompts(seed, batch), min(results, width)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=width, length_penalty=penalty, early_stopping=early,
                           num_return_sequences=results, max_new_tokens=12, return_dict_in_generate=True, output_scores=True)
    got = beam(ours.step, ours.new_cache(), prompt=ids, eos_id=EOS, max_len=12, width=width, length_penalty=penalty, early_stopping=early,
               results=results)
    assert torch.equal(got.ids, want.sequences)
    if width == 1: return                # generate searches greedily then and gives no sequence scores
    torch.testing.assert_close(got.scores, want.sequences_scores, atol=1e-4, rtol=1e-5)

@pytest.mark.parametrize('penalty, early, width, batch', list(itertools.product((.5, 1., 2.), (False, True), (2, 4), (1, 3))))
def test_every_setting_on_one_model(penalty, early, width, batch):
    theirs, ours = pair(77)
    ids = prompts(5, batch, 2)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=width, length_penalty=penalty, early_stopping=early,
                           num_return_sequences=width, max_new_tokens=10)
    got = beam(ours.step, ours.new_cache(), prompt=ids, eos_id=EOS, max_len=10, width=width, length_penalty=penalty, early_stopping=early, results=width)
    assert torch.equal(got.ids, want)

def test_some_of_these_runs_end_by_themselves():
    "The comparisons above would be hollow if every row ran to the limit"
    ended = []
    for seed in range(6):
        _, ours = pair(seed)
        done = beam(ours.step, ours.new_cache(), prompt=prompts(seed, 4), eos_id=EOS, max_len=12, width=4)
        ended += done.stopped.tolist()
    assert any(ended) and not all(ended)

@given(st.integers(0, 10**6), st.floats(.2, 3.), st.none() | st.integers(1, 25), st.none() | st.floats(.05, 1.))
@settings(max_examples=60, deadline=None)
def test_cuts_are_transformers(seed, temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(seed))*3
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k: want = TopKLogitsWarper(min(top_k, VOCAB))(None, want)
    if top_p is not None and top_p < 1: want = TopPLogitsWarper(top_p)(None, want)
    assert torch.equal(cut_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p), want.softmax(-1))


# ---- the authors' stored runs, on an uncached model written from their weights ----

class Official:
    "The authors' text generator as plain functions: everything is read again at every step, so beams reorder ids only"
    def __init__(self, weights, config, prefix, visual):
        self.w, self.heads, self.cross, self.prefix, self.visual = weights, config['hf_text_config']['n_head'], config['args']['heads'], prefix, visual
        self.layers, self.ids = config['hf_text_config']['n_layer'], None

    def reorder(self, rows): self.ids = self.ids[rows]

    def norm(self, x, name): return F.layer_norm(x, x.shape[-1:], self.w[name + '.weight'], self.w[name + '.bias'])

    def mix(self, q, k, v, heads, causal):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    def gated(self, y, p):
        w, q = self.w, self.norm(y, p + 'attn.layer_norm')@self.w[p + 'attn.to_q.weight'].T
        k, v = (self.visual.expand(len(y), -1, -1)@w[p + 'attn.to_kv.weight'].T).chunk(2, -1)
        y = y + w[p + 'alpha_attn'].tanh()*(self.mix(q, k, v, self.cross, False)@w[p + 'attn.to_out.weight'].T)
        return y + w[p + 'alpha_ffw'].tanh()*(F.gelu(self.norm(y, p + 'ffw.0')@w[p + 'ffw.1.weight'].T)@w[p + 'ffw.3.weight'].T)

    def block(self, y, p):
        conv = lambda x, name: x@self.w[p + name + '.weight'] + self.w[p + name + '.bias']
        y = y + conv(self.mix(*conv(self.norm(y, p + 'ln_1'), 'attn.c_attn').chunk(3, -1), self.heads, True), 'attn.c_proj')
        return y + conv(F.gelu(conv(self.norm(y, p + 'ln_2'), 'mlp.c_fc'), approximate='tanh'), 'mlp.c_proj')

    def step(self, ids, cache):
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        words, places = (self.w[f'lm.transformer.{t}.weight'] for t in ('wte', 'wpe'))
        y = torch.cat([self.prefix.expand(len(self.ids), -1, -1), words[self.ids]], 1)
        y = y + places[:y.shape[1]]
        for i in range(self.layers):
            y = self.block(self.gated(y, f'lm.transformer.h.{i}.xattn_block.'), f'lm.transformer.h.{i}.lm_block.')
        return (self.norm(y, 'lm.transformer.ln_f')@words.T)[:, -1]

def stored():
    config = json.loads((GOLDEN/'config.json').read_text())
    io, weights = load_file(GOLDEN/'io.safetensors'), load_file(GOLDEN/'weights.safetensors')
    return config, io, weights, dict(bos_id=config['bos_token_id'], eos_id=config['eos_token_id'])

def official(config, io, weights, call, i):
    s = call.get('sample', i%3)
    model = Official(weights, config, io['in.prefix'][s:s+1], io['in.resampled'][s:s+1])
    return model.step, model

def test_golden_greedy():
    config, io, weights, marks = stored()
    for i, call in enumerate(config['calls']['greedy']):
        got = greedy(*official(config, io, weights, call, i), max_len=call['maxlen'], **marks)
        assert torch.equal(got.ids[0], io[f'out.greedy{i}.ids'])

def test_golden_nucleus():
    config, io, weights, marks = stored()
    for i, call in enumerate(config['calls']['nucleus']):
        got = published_nucleus(*official(config, io, weights, call, i), max_len=call['maxlen'], temperature=call['temp'], top_p=call['tp'],
                                top_k=call['tk'], uniforms=io[f'in.nucleus{i}.uniforms'][None], keep_probs=True, **marks)
        assert torch.equal(got.ids[0], io[f'out.nucleus{i}.ids'])
        torch.testing.assert_close(got.probs[0], io[f'out.nucleus{i}.probs'], atol=1e-5, rtol=0)

def test_golden_beams():
    config, io, weights, marks = stored()
    for i, call in enumerate(config['calls']['beam']):
        width = call['bw']
        got = published_beam(*official(config, io, weights, call, i), max_len=call['maxlen'], temperature=call['temp'], width=width,
                             results=width, published_cut=True, **marks)
        assert torch.equal(got.ids, io[f'out.beam{i}.tokens'])
        assert torch.equal(got.stopped, io[f'out.beam{i}.has_stopped']) and torch.equal(got.lengths.float(), io[f'out.beam{i}.seq_lengths'])
        torch.testing.assert_close(got.scores, io[f'out.beam{i}.scores'], atol=1e-5, rtol=0)
        assert [marks['bos_id'], *got.words()[0]] == io[f'out.beam{i}.best_ids'].tolist()


# ---- slow twins and exhaustive search ----

class Toy:
    "A random language whose next word depends on the whole past: logits are read from a table by a hash of the ids"
    def __init__(self, seed, vocab=5, scale=2.):
        self.table, self.ids = torch.randn(997, vocab, generator=torch.Generator().manual_seed(seed))*scale, None
    def logits(self, ids): return self.table[(ids*torch.tensor([(31*i + 7)**2%991 for i in range(ids.shape[1])])).sum(1)%997]
    def reorder(self, rows): self.ids = self.ids[rows]
    def step(self, ids, cache):
        cache.ids = ids if cache.ids is None else torch.cat([cache.ids, ids], 1)
        return self.logits(cache.ids)
    def score(self, ids): return self.logits(torch.tensor([ids])).log_softmax(-1)[0].tolist()

def sentences(toy, start, max_len, vocab=5):
    "Summed log-probability of every sentence that ends with word 0 or reaches max_len"
    todo = [(0., start)]
    while todo:
        total, ids = todo.pop()
        for w, p in enumerate(toy.score(ids)):
            grown = (total + p, ids + [w])
            if w == 0 or len(ids) == max_len: yield grown
            else: todo.append(grown)

@pytest.mark.parametrize('seed, penalty', list(itertools.product(range(6), (0., 1., 2.))))
def test_wide_beams_are_exhaustive(seed, penalty):
    toy, start = Toy(seed), [1 + seed%4]
    every = sorted(((p/(len(ids) - 1)**penalty, ids) for p, ids in sentences(toy, start, 4)), reverse=True)
    got = beam(toy.step, Toy(seed), prompt=torch.tensor([start]), eos_id=0, max_len=4, width=256, results=5, length_penalty=penalty, early_stopping='never')
    assert [start + w for w in got.words()] == [[i for i in ids if i] for _, ids in every[:5]]
    np.testing.assert_allclose(got.scores, [s for s, _ in every[:5]], atol=1e-5)

@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.sampled_from((-.5, 0., .7, 1., 2.)),
       st.sampled_from((False, True, 'never')))
@settings(max_examples=80, deadline=None)
def test_beams_are_their_twin(seed, batch, width, max_len, penalty, early):
    toy, how = Toy(seed, vocab=12), dict(width=width, eos_id=0, max_len=max_len, length_penalty=penalty, early_stopping=early)
    ids = torch.randint(1, 12, (batch, 2), generator=torch.Generator().manual_seed(seed))
    got = beam(toy.step, toy, prompt=ids, results=width, **how)
    want = [best for row in ids.tolist() for best in beam_ref(toy.score, row, **how)]
    assert [row[:2 + n].tolist() for row, n in zip(got.ids, got.lengths)] == [ids for _, ids in want]
    np.testing.assert_allclose(got.scores, [s for s, _ in want], atol=1e-4)

@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_rows_of_a_batch_do_not_touch_each_other(seed, batch):
    toy = lambda: Toy(seed, vocab=12)
    ids = torch.randint(1, 12, (batch, 2), generator=torch.Generator().manual_seed(seed))
    u = torch.rand(batch, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ways = dict(greedy=lambda p, u: greedy(toy().step, toy(), prompt=p, eos_id=0, max_len=8),
                beam=lambda p, u: beam(toy().step, toy(), prompt=p, eos_id=0, max_len=8, width=3),
                published=lambda p, u: published_beam(toy().step, toy(), prompt=p, eos_id=0, max_len=8, width=3),
                sample=lambda p, u: sample(toy().step, toy(), prompt=p, eos_id=0, max_len=8, top_p=.9, uniforms=u),
                nucleus=lambda p, u: published_nucleus(toy().step, toy(), prompt=p, eos_id=0, max_len=8, uniforms=u))
    for name, way in ways.items():
        together = way(ids, u)
        for i in range(batch):
            alone = way(ids[i:i+1], u[i:i+1])
            assert together.words()[i] == alone.words()[0], name
            assert together.stopped[i] == alone.stopped[0] and together.lengths[i] == alone.lengths[0], name
            torch.testing.assert_close(together.scores[i], alone.scores[0], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('way', (greedy, beam, published_beam))
def test_cached_is_uncached(way):
    _, ours = pair(3)
    class All:
        ids = None
        def reorder(self, rows): self.ids = self.ids[rows]
    def uncached(ids, cache):
        cache.ids = ids if cache.ids is None else torch.cat([cache.ids, ids], 1)
        return ours(cache.ids)[:, -1]
    ids = prompts(3, 3)
    a = way(ours.step, ours.new_cache(), prompt=ids, eos_id=EOS, max_len=12)
    b = way(uncached, All(), prompt=ids, eos_id=EOS, max_len=12)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.stopped, b.stopped)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-5)

def test_left_padding_is_the_models_business():
    "A row padded on the left decodes as the same row alone"
    _, ours = pair(8)
    ids = prompts(8, 2, 5)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :2] = False
    masked = lambda new, cache: ours.step(new, cache, keep if cache.length == 0 else None)
    both = beam(masked, ours.new_cache(), prompt=ids, eos_id=EOS, max_len=10, width=3)
    alone = beam(ours.step, ours.new_cache(), prompt=ids[1:, 2:], eos_id=EOS, max_len=10, width=3)
    assert both.words()[1] == alone.words()[0]


# ---- properties ----

logit_rows = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)

@given(logit_rows, st.floats(.1, 5.), st.none() | st.integers(1, 9), st.none() | st.floats(.01, 1.))
@settings(max_examples=80, deadline=None)
def test_what_is_left_sums_to_one(logits, temperature, top_k, top_p):
    for cut in (cut_probs, published_probs):
        probs = cut(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(logits)), atol=1e-5, rtol=0)
        assert (probs >= 0).all()
        best_kept = logits.masked_fill(probs == 0, -torch.inf).amax(-1)
        torch.testing.assert_close(best_kept, logits.amax(-1), atol=1e-4, rtol=1e-4)     # the likeliest stays, ties aside
        if top_k and cut is published_probs: assert ((probs > 0).sum(-1) <= top_k).all()

@given(logit_rows, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_only_kept_words_are_drawn(logits, seed):
    probs = published_probs(logits, top_p=.7)
    edge = torch.tensor([0., 1., .5, 1 - 1e-16], dtype=torch.float64)
    for u in (edge[:len(logits)], torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)):
        assert (probs.gather(1, draw(probs, u)[:, None]) > 0).all()

def test_draws_have_the_right_frequencies():
    probs = torch.tensor([[.1, .2, .3, .4]]).expand(8000, 4)
    words = draw(probs, torch.rand(8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(words.bincount(minlength=4)/8000, probs[0], atol=.02, rtol=0)

def test_a_generator_repeats_itself():
    toy = lambda: Toy(1, vocab=12)
    run = lambda seed: sample(toy().step, toy(), bos_id=1, eos_id=0, max_len=9, batch=4, generator=torch.Generator().manual_seed(seed)).ids
    assert torch.equal(run(5), run(5)) and run(5).shape[0] == 4
    assert any(run(5).shape != run(s).shape or not torch.equal(run(5), run(s)) for s in (6, 7))

def test_nearly_nothing_left_is_greedy():
    toy = lambda: Toy(4, vocab=12)
    best = greedy(toy().step, toy(), bos_id=1, eos_id=0, max_len=9).ids
    for how in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)):
        assert torch.equal(sample(toy().step, toy(), bos_id=1, eos_id=0, max_len=9, **how).ids, best)
    assert torch.equal(published_nucleus(toy().step, toy(), bos_id=1, eos_id=0, max_len=9, top_p=1e-6).ids, best)

def test_no_end_marker():
    toy = lambda: Toy(4, vocab=12)
    for way in (greedy, sample, beam, published_beam, published_nucleus):
        done = way(toy().step, toy(), bos_id=1, max_len=6)
        assert done.ids.shape == (1, 7) and not done.stopped.any() and done.lengths.tolist() == [6] and len(done.words()[0]) == 6

@pytest.mark.parametrize('wrong, said', [(dict(max_len=0), 'max_len=0'), (dict(max_len=3, prompt=torch.tensor([1])), r'\(1,\)'),
                                         (dict(max_len=3, bos_id=None), 'bos_id')])
@pytest.mark.parametrize('way', (greedy, sample, beam, published_beam, published_nucleus))
def test_mistakes_are_named(way, wrong, said):
    with pytest.raises(ValueError, match=said): way(Toy(0).step, Toy(0), **(dict(bos_id=1) | wrong))

@pytest.mark.parametrize('way', (beam, published_beam))
def test_beams_must_make_sense(way):
    for width in (0, -1):
        with pytest.raises(ValueError, match=f'width={width}'): way(Toy(0).step, Toy(0), bos_id=1, max_len=3, width=width)
    with pytest.raises(ValueError, match='results=3 of width=2'): way(Toy(0).step, Toy(0), bos_id=1, max_len=3, width=2, results=3)
    with pytest.raises(ValueError, match='vocabulary of 5'): published_beam(Toy(0).step, Toy(0), bos_id=1, max_len=3, width=9)
