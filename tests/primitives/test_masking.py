"Masking: nothing is hidden that must not be, answers restore the text, shares are the published ones, blocks against a slow twin."
import math
import random
from math import comb
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.masking import block_mask, corpus_chunks, corpus_row, simla_mask_words, uni_mask_words, vlc_choose, vlc_mask_words
from vl_tutor.primitives.texts import ClipPairs, fixed_ids
from vl_tutor.primitives.words import PieceTokenizer, mask_whole_words

quick = settings(max_examples=40, deadline=None, derandomize=True)
PIECES = '[PAD] [CLS] [SEP] [MASK] [UNK] a red blue square tri ##angle circ ##le'.split()


@pytest.fixture(scope='module')
def bert():
    from transformers import BertTokenizer
    return PieceTokenizer(BertTokenizer(vocab={w: i for i, w in enumerate(PIECES)}))


@pytest.fixture(scope='module')
def pairs(): return ClipPairs(['r e', 're d</w>'])


TEXTS = ['a red triangle', 'a blue circle a red square', 'a', 'triangle circle '*30]


@pytest.mark.parametrize('game', [vlc_mask_words, simla_mask_words])
def test_answers_restore_the_text(bert, game):
    ids, _ = fixed_ids(bert, TEXTS*50)
    seen, labels = game(bert, ids, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.where(labels >= 0, labels, seen), ids)
    outside = ~bert.maskable(ids) if game is vlc_mask_words else (ids == bert.pad_id) | (ids == bert.bos_id)
    assert (labels[outside] == -100).all() and (labels >= 0).any()
    again = game(bert, ids, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen, again[0]) and torch.equal(labels, again[1])


def test_vlc_chooses_whole_words_within_its_budget(bert):
    ids, _ = fixed_ids(bert, TEXTS*50)
    chosen = vlc_choose(bert, ids, generator=torch.Generator().manual_seed(1))
    assert (chosen.sum(1) <= 6).all() and (chosen & (ids == bert.pad_id)).any()
    goes_on = ~bert.word_starts(ids)
    assert (chosen[:, 1:][goes_on[:, 1:]] == chosen[:, :-1][goes_on[:, 1:]]).all()


def test_vlc_leaves_short_captions_without_a_question(bert):
    ids = torch.zeros(4000, 40, dtype=torch.long)
    ids[:, 0], ids[:, 1:11], ids[:, 11] = 1, 6, 2
    dice = torch.Generator().manual_seed(0)
    share = 1 - (vlc_mask_words(bert, ids, generator=dice)[1] >= 0).any(1).float().mean()
    assert abs(share - comb(28, 6)/comb(38, 6)) < .02                      # the published 13.6 %
    labels = mask_whole_words(ids, bert.word_starts(ids), bert.maskable(ids), mask_id=3, vocab_size=9, generator=dice)[1]
    assert (labels >= 0).any(1).all()                                      # the repaired default


def test_simla_shares(bert):
    ids = torch.full((400, 30), 6)
    seen, labels = simla_mask_words(bert, ids, generator=torch.Generator().manual_seed(0))
    asked = labels >= 0
    assert abs(asked.float().mean() - .15) < .01
    assert abs((seen[asked] == bert.mask_id).float().mean() - (.8 + .1/len(PIECES))) < .03


@quick
@given(text=st.lists(st.sampled_from(['red', 'reds', 'a', '<|endoftext|>']), min_size=1, max_size=30), seed=st.integers(0, 99), rate=st.sampled_from([.15, .5, 1.]))
def test_uni_labels_cover_whole_words(text, seed, rate):
    pairs = ClipPairs(['r e', 're d</w>'])
    ids, labels = uni_mask_words(pairs, text, rate=rate, rng=random.Random(seed))
    own = [pairs.word_ids(w) for w in text]
    assert len(ids) == len(labels) == sum(map(len, own))
    at = 0
    for word in own:
        mine = slice(at, at + len(word)); at += len(word)
        assert labels[mine] in (word, [-1]*len(word))
        if labels[mine] == [-1]*len(word): assert ids[mine] == word
        if pairs.spe_id in ids[mine] and rate < 1: assert labels[mine] == word
    assert (ids, labels) == uni_mask_words(pairs, text, rate=rate, rng=random.Random(seed))


def test_uni_shares(pairs):
    ids, labels = uni_mask_words(pairs, ['red']*40_000, rng=random.Random(0))
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    asked = labels >= 0
    assert abs(asked.float().mean() - .15) < .006 and abs((ids[asked] == pairs.spe_id).float().mean() - .8) < .02
    assert abs((ids[asked] == labels[asked]).float().mean() - .1) < .012
    with pytest.raises(ValueError): uni_mask_words(pairs, ['red', 'a'], dice=[.1])


def test_corpus(pairs):
    lines = ['one two three.', ' ', 'four five', 'six', 'seven eight nine ten']
    chunks = list(corpus_chunks(pairs, lines, 5))
    assert [w for c in chunks for w in c] == [w for line in lines if line.strip() for w in [*pairs.words(line), '<|endoftext|>']]
    assert all(len(c) >= 5 and c[-1] == '<|endoftext|>' for c in chunks[:-1])
    for chunk in chunks:
        ids, labels = corpus_row(pairs, chunk, 6, rng=random.Random(0), rate=0.0001)
        assert len(ids) == len(labels) == 6 and ids[-1] == pairs.eos_id
    assert list(corpus_chunks(pairs, [])) == []


# ---- blocks ----

def slow_blocks(rows, cols, target, smallest, dice):
    "The recipe patch by patch"
    hidden = set()
    while len(hidden) < target:
        room = target - len(hidden)
        for _ in range(10):
            area, shape = dice.uniform(smallest, room), math.exp(dice.uniform(math.log(.3), math.log(1/.3)))
            h, w = int(round(math.sqrt(area*shape))), int(round(math.sqrt(area/shape)))
            if w < cols and h < rows:
                top, left = dice.randint(0, rows - h), dice.randint(0, cols - w)
                new = {(r, c) for r in range(top, top + h) for c in range(left, left + w)} - hidden
                if 0 < len(new) <= room: hidden |= new; break
        else: break
    return torch.tensor([[(r, c) in hidden for c in range(cols)] for r in range(rows)])


@quick
@given(seed=st.integers(0, 10_000), rows=st.integers(5, 18), cols=st.integers(5, 18), share=st.floats(0, .6), smallest=st.sampled_from([4, 9, 16]))
def test_blocks_against_the_slow_twin(seed, rows, cols, share, smallest):
    target = int(share*rows*cols)
    found = block_mask(rows, cols, target, smallest=smallest, dice=random.Random(seed))
    assert torch.equal(found, slow_blocks(rows, cols, target, smallest, random.Random(seed)))
    assert found.sum() <= target


def test_blocks_draw_from_pythons_own_dice():
    random.seed(3); state = random.getstate()
    assert torch.equal(block_mask(16, 16, 75, dice=random), block_mask(16, 16, 75, dice=random.Random(3)))
    assert random.getstate() != state
    assert block_mask(4, 4, 0).sum() == 0
    with pytest.raises(ValueError, match='cannot hide 17 patches of a 4×4 grid'): block_mask(4, 4, 17)
