"Metrics against the packages that define them, the authors' stored numbers, and properties that must always hold."
import json, os, random
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file
from vl_tutor.training.metrics import (bleu, cider_d, cider_d_ref, coco_scores, exact_match, lcs, lcs_ref, published_scores,
                                       rouge_l, tokens_13a, tokens_plain)

GOLDEN = Path(os.environ.get('VL_TUTOR_GOLDEN', Path(__file__).resolve().parents[1]/'golden'))/'captioner'/'metrics'
WORDS = 'a the red blue disc star left of on , 3.5 Red'.split()
word = st.sampled_from(WORDS)
caption = st.lists(word, max_size=9).map(' '.join)
filled = st.lists(word, min_size=1, max_size=9).map(' '.join)

def corpora(text, most=6):
    "Lists of (prediction, references)"
    return st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=4)), min_size=1, max_size=most)

def corpus(n, refs, seed, words=60):
    "Random captions whose word frequencies fall like 1/rank"
    rng = random.Random(seed)
    book = [f'w{i}' for i in range(words)]
    draw = lambda: ' '.join(rng.choices(book, [1/(i + 1) for i in range(words)], k=rng.randint(1, 14)))
    return [draw() for _ in range(n)], [[draw() for _ in range(rng.randint(1, refs))] for _ in range(n)]

def oracle(scorer, preds, refs):
    return scorer.compute_score(dict(enumerate(refs)), {i: [p] for i, p in enumerate(preds)})


@pytest.fixture(scope='module')
def golden():
    return json.loads((GOLDEN/'config.json').read_text()), load_file(GOLDEN/'io.safetensors')

def test_golden_published(golden):
    config, want = golden
    for preds, refs, key in (('predictions', 'references', 'out.multi_ref'), ('predictions_single', 'references_single', 'out.single_ref')):
        got = published_scores(config[preds], config[refs])
        np.testing.assert_allclose(got[:2], want[key][:2], atol=1e-12)
        assert abs(got[2] - want[key][2]) < .05          # theirs is a bootstrap median

def test_golden_parts(golden):
    config, want = golden
    p, r = zip(*((p, r) for p, r in zip(config['predictions'], config['references']) if p))
    got = bleu(p, r)
    np.testing.assert_allclose(got.precisions, want['out.bleu_precisions'], atol=1e-12)
    np.testing.assert_allclose((got.brevity, got.length, got.reference_length), want['out.bleu_brevity_lengths'], atol=1e-12)
    np.testing.assert_allclose(rouge_l(p, r).each, want['out.rougeL_each'], atol=1e-12)


@pytest.mark.parametrize('seed', range(4))
def test_pycocoevalcap(seed):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    preds, refs = corpus(80, 5, seed, words=7)   # few words, so that every order has a hit: theirs adds 1e-15 instead of a zero
    got = coco_scores(preds, refs, tokenize=str.split)
    total, each = oracle(Cider(), preds, refs)
    np.testing.assert_allclose(cider_d(preds, refs, tokenize=str.split).each, each, atol=1e-6)
    assert abs(got['CIDEr'] - total) < 1e-6
    total, each = oracle(Rouge(), preds, refs)
    np.testing.assert_allclose(rouge_l(preds, refs, tokenize=str.split, style='coco').each, each, atol=1e-6)
    assert abs(got['ROUGE_L'] - total) < 1e-6
    scorer = Bleu()
    total, _ = scorer.compute_score(dict(enumerate(refs)), {i: [p] for i, p in enumerate(preds)}, verbose=0)
    np.testing.assert_allclose([got[f'Bleu_{n}'] for n in (1, 2, 3, 4)], total, atol=1e-6)

@given(st.text(alphabet='aB3.,-&;<>!\'" \n_/quotampltgskiped', max_size=24))
@settings(max_examples=300, deadline=None)
def test_13a_is_sacrebleus(text):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    assert ' '.join(tokens_13a(text)) == Tokenizer13a()(text)

@given(st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_rouge_is_rouge_score(pred, ref):
    from rouge_score.rouge_scorer import RougeScorer
    want = RougeScorer(['rougeL']).score(ref, pred)['rougeL'].fmeasure
    assert abs(rouge_l([pred], [ref]).score - want) < 1e-12

def test_rouge_is_rouge_score_on_captions():
    from rouge_score.rouge_scorer import RougeScorer
    preds, refs = corpus(60, 4, 9, words=15)
    scorer = RougeScorer(['rougeL'])
    want = [scorer.score_multi(r, p)['rougeL'].fmeasure for p, r in zip(preds, refs)]
    np.testing.assert_allclose(rouge_l(preds, refs).each, want, atol=1e-12)


@given(st.lists(word, max_size=70), st.lists(word, max_size=12))
@settings(max_examples=200, deadline=None)
def test_lcs_is_its_table(a, b):
    assert lcs(a, b) == lcs_ref(a, b)[-1][-1] == lcs(b, a)

@given(corpora(caption))
@settings(max_examples=150, deadline=None)
def test_cider_is_its_twin(data):
    preds, refs = zip(*data)
    np.testing.assert_allclose(cider_d(preds, refs).each, cider_d_ref(preds, refs), atol=1e-9)

@given(corpora(caption), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_order_changes_nothing(data, rng):
    order = rng.sample(range(len(data)), len(data))
    preds, refs = zip(*data)
    moved_p, moved_r = zip(*(data[i] for i in order))
    np.testing.assert_allclose(cider_d(moved_p, moved_r).each, cider_d(preds, refs).each[order], atol=1e-9)
    np.testing.assert_allclose(published_scores(moved_p, moved_r), published_scores(preds, refs), atol=1e-9)

@given(st.lists(st.tuples(filled, filled), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_repeating_the_reference_is_best(data):
    preds, refs = zip(*data)
    assert (cider_d(refs, refs).each >= cider_d(preds, refs).each - 1e-9).all()
    assert (rouge_l(refs, refs).each >= rouge_l(preds, refs).each).all()
    assert bleu(refs, refs, 1).score == 1. >= bleu(preds, refs, 1).score
    assert exact_match(refs, refs) == 1.

def test_identical_captions_reach_the_top():
    refs = ['a red disc left of a star', 'a blue ring above a cross', 'a green seven on top of a three']
    np.testing.assert_allclose(cider_d(refs, refs).each, 10., atol=1e-9)
    np.testing.assert_allclose(published_scores(refs, refs), 1., atol=1e-12)

@given(corpora(caption))
@settings(max_examples=80, deadline=None)
def test_ranges_and_empty_predictions(data):
    preds, refs = zip(*data)
    each = cider_d(preds, refs).each
    assert (each >= 0).all() and (each <= 10 + 1e-9).all()
    kept = [(p, r) for p, r in data if p.strip()]
    want = np.array(published_scores(*zip(*kept)))*len(kept)/len(data) if kept else np.zeros(3)
    np.testing.assert_allclose(published_scores(preds, refs), want, atol=1e-12)
    assert all(0 <= s <= 1 for s in published_scores(preds, refs))


def test_one_more_reference_never_hurts_rouge_best():
    preds, refs = corpus(30, 3, 5, words=12)
    more = [[*r, 'w0 w1 w2'] for r in refs]
    assert (rouge_l(preds, more).each >= rouge_l(preds, refs).each).all()

@pytest.mark.parametrize('score', [bleu, rouge_l, cider_d, exact_match, published_scores, coco_scores, cider_d_ref])
def test_mistakes_are_named(score):
    with pytest.raises(ValueError, match='2 predictions but 1'): score(['a', 'b'], ['a'])
    with pytest.raises(ValueError, match='prediction 1 has no reference'): score(['a', 'b'], ['a', []])

def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="'longest'"): bleu(['a'], ['a'], pick='longest')
    with pytest.raises(ValueError, match="'mean'"): rouge_l(['a'], ['a'], style='mean')

def test_nothing_to_score():
    assert published_scores([], []) == (0., 0., 0.) and exact_match([], []) == 0. and cider_d([], []).score == 0.
    assert tokens_plain('…') == () and bleu([''], ['a']).score == 0.
