"Words: round trips, transformers' tokenisers from folders made here, masking against slow twins, and one-sentence errors."
import json
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.words import (PieceTokenizer, WordTokenizer, byte_letters, byte_pair_tokenizer, byte_pairs_ref, choose_words,
                                        load_tokenizer, mask_draws, mask_whole_words, mask_words, pad_rows, published_caption_ids,
                                        word_groups)

quick = settings(max_examples=60, deadline=None, derandomize=True)
WORDS = 'a red blue green square circle left of above small large the is'.split()
MERGES = ['Ġ a', 'r e', 're d', 'Ġ red', 'q u', 'qu a', 's qua', 'squa re', 'c i', 'ci r', 'Ġ s', 'l e']
PIECES = '[PAD] [CLS] [SEP] [MASK] [UNK] a red blue square tri ##angle circ ##le rect ##s . , the of left'.split()


@pytest.fixture(scope='module')
def world(): return WordTokenizer(WORDS)


@pytest.fixture(scope='module')
def gpt(): return byte_pair_tokenizer(MERGES)


@pytest.fixture(scope='module')
def bert():
    from transformers import BertTokenizer
    return PieceTokenizer(BertTokenizer(vocab={w: i for i, w in enumerate(PIECES)}))


def one_sentence(error): return '\n' not in str(error.value) and len(str(error.value)) < 400


# ---- round trips ----

@quick
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(' '.join), min_size=1, max_size=5))
def test_words_there_and_back(texts):
    tokenizer = WordTokenizer(WORDS)
    ids, mask = tokenizer.encode(texts)
    assert tokenizer.decode(ids) == texts
    assert mask.sum(1).tolist() == [len(t.split()) + 2 for t in texts]
    assert (ids[~mask] == tokenizer.pad_id).all() and (ids[:, 0] == tokenizer.bos_id).all()
    assert ((ids == tokenizer.eos_id).sum(1) == 1).all()


@quick
@given(texts=st.lists(st.text('abRé<>', min_size=1, max_size=5).map(lambda w: f'red {w} a'), max_size=5))
def test_old_words_keep_their_numbers(texts):
    old = WordTokenizer(WORDS)
    new = old.grown(texts)
    fresh = sorted({w for t in texts for w in t.lower().split()} - set(WORDS))
    assert new.tokens(range(5, new.vocab_size)) == WORDS + fresh and (new is old) == (not fresh)
    assert new.encode([*texts, 'a red circle'])[0].ne(new.unk_id).all() and old.vocab_size == 5 + len(WORDS)


def test_markers_are_no_new_words(): assert WordTokenizer(WORDS).grown(['a <mask> red <pad>', '']).vocab_size == 5 + len(WORDS)


@quick
@given(text=st.text(max_size=40).filter(lambda t: '<|endoftext|>' not in t))
def test_bytes_leave_no_text_unknown(text):
    tokenizer = byte_pair_tokenizer(MERGES)
    text = text.encode('utf-8', 'ignore').decode()
    assert tokenizer.decode(tokenizer.encode([text])[0]) == [text]


@quick
@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5), more=st.integers(0, 3))
def test_padding_is_only_padding(rows, more):
    n = max(map(len, rows), default=0) + more
    ids, mask = pad_rows(rows, 0, n)
    assert ids.shape == mask.shape == (len(rows), n) and ids.dtype == torch.long and mask.dtype == torch.bool
    assert [row[keep].tolist() for row, keep in zip(ids, mask)] == rows and (ids[~mask] == 0).all()


@pytest.mark.parametrize('name', ['world', 'gpt', 'bert'])
def test_padding_and_neighbours_never_matter(name, request):
    tokenizer = request.getfixturevalue(name)
    alone, _ = tokenizer.encode(['a red square'])
    ids, mask = tokenizer.encode(['a red square', 'a red square left of the blue square'])
    assert ids[0][mask[0]].tolist() == alone[0].tolist()
    assert tokenizer.decode(ids)[0] == tokenizer.decode(alone)[0] == 'a red square'


@pytest.mark.parametrize('name', ['world', 'gpt', 'bert'])
def test_cut_rows_keep_their_end(name, request):
    tokenizer = request.getfixturevalue(name)
    ids, mask = tokenizer.encode(['a red square left of the blue square', 'a'], max_len=5)
    assert ids.shape[1] <= 5 and ids[0, -1] == tokenizer.eos_id and ids[0, 0] == tokenizer.bos_id
    bare, _ = tokenizer.encode(['a red'], markers=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(bare[0].tolist())


def test_ids_are_the_contract(world):
    assert (world.pad_id, world.bos_id, world.eos_id, world.unk_id, world.mask_id) == (0, 1, 2, 3, 4)
    assert world.vocab_size == len(WORDS) + 5
    assert world.encode(['A RED zebra'])[0].tolist() == [[1, 5, 6, 3, 2]]
    assert world.encode([])[0].shape == (0, 0)
    assert world.decode([[1, 5, 6, 2, 7, 7]]) == ['a red']                   # nothing after the end


# ---- the real tokenisers ----

def test_byte_letters_are_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    assert byte_letters() == list(bytes_to_unicode().values())


@quick
@given(word=st.text(alphabet='redsquacil', min_size=1, max_size=12))
def test_pairs_by_hand_are_the_librarys(word):
    tokenizer = byte_pair_tokenizer(MERGES)
    assert tokenizer.tokens(tokenizer.pieces(word)) == byte_pairs_ref(word, MERGES)


def test_vocabulary_rule(gpt):
    "256 bytes, one id per merge, the marker last"
    assert gpt.vocab_size == 256 + len(MERGES) + 1 and gpt.eos_id == gpt.bos_id == gpt.pad_id == 256 + len(MERGES)
    assert gpt.tokens([0, 220, 256, 258]) == ['!', 'Ġ', 'Ġa', 'red']


def test_bert_reads_pieces(bert):
    ids, mask = bert.encode(['A red triangle, the rects', 'blue'])
    assert bert.tokens(ids[0]) == ['[CLS]', 'a', 'red', 'tri', '##angle', ',', 'the', 'rect', '##s', '[SEP]']
    assert bert.word_starts(ids)[0].int().tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert bert.maskable(ids).sum(1).tolist() == [8, 1]
    assert bert.mask_id == 3 and (bert.bos_id, bert.eos_id, bert.pad_id) == (1, 2, 0)


def test_gpt_words_start_at_blanks(gpt):
    ids = torch.tensor([gpt.pieces(' red square')])
    starts = gpt.word_starts(ids)[0].tolist()
    assert starts[0] and sum(starts) == 2


# ---- folders ----

@pytest.mark.parametrize('name', ['world', 'gpt', 'bert'])
def test_saved_and_opened_again(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path/'made'/name)
    again = load_tokenizer(tmp_path/'made'/name, vocab_size=tokenizer.vocab_size)
    texts = ['a red square', 'the blue triangle left of a circle!']
    assert type(again) is type(tokenizer)
    for a, b in zip(again.encode(texts), tokenizer.encode(texts)): assert torch.equal(a, b)
    for key in ('bos_id', 'eos_id', 'pad_id', 'mask_id', 'vocab_size'): assert getattr(again, key) == getattr(tokenizer, key)


def test_old_style_folders(tmp_path, gpt, bert):
    "vocab.json + merges.txt and vocab.txt beside a config.json, as released models carry them"
    vocab = gpt.inner.get_vocab()
    (tmp_path/'gpt').mkdir(); (tmp_path/'bert').mkdir()
    (tmp_path/'gpt'/'vocab.json').write_text(json.dumps(vocab))
    (tmp_path/'gpt'/'merges.txt').write_text('#version: 0.2\n' + '\n'.join(MERGES) + '\n')
    (tmp_path/'gpt'/'config.json').write_text('{"model_type": "gpt2"}')
    (tmp_path/'bert'/'vocab.txt').write_text('\n'.join(PIECES) + '\n')
    (tmp_path/'bert'/'config.json').write_text('{"model_type": "bert"}')
    texts = ['a red square', 'a blue triangle.']
    assert torch.equal(load_tokenizer(tmp_path/'gpt').encode(texts)[0], gpt.encode(texts)[0])
    assert torch.equal(load_tokenizer(tmp_path/'bert').encode(texts)[0], bert.encode(texts)[0])


def test_wrong_folders_get_one_sentence(tmp_path, gpt, world):
    (tmp_path/'junk').mkdir()
    (tmp_path/'junk'/'tokenizer.json').write_text('{"no": "model"}')
    (tmp_path/'text.json').write_text('not json')
    (tmp_path/'empty').mkdir()
    gpt.save(tmp_path/'gpt')
    for path in ('junk', 'text.json', 'empty', 'missing'):
        with pytest.raises(ValueError, match=path) as error: load_tokenizer(tmp_path/path)
        assert one_sentence(error), error
    for path in ('gpt', 'junk', 'missing', 'text.json'):
        with pytest.raises(ValueError, match=path) as error: WordTokenizer.load(tmp_path/path)
        assert one_sentence(error), error
    with pytest.raises(ValueError, match='gpt has 269 words, but the model knows 60'): load_tokenizer(tmp_path/'gpt', vocab_size=60)
    world.save(tmp_path/'world')
    with pytest.raises(ValueError, match='world has 18 words'): load_tokenizer(tmp_path/'world', vocab_size=17)


def test_saved_file_is_json_that_tokenizers_reads(world, tmp_path):
    from tokenizers import Tokenizer
    file = world.save(tmp_path)
    assert file.name == 'tokenizer.json' and json.loads(file.read_text())['model']['type'] == 'WordLevel'
    assert Tokenizer.from_file(str(file)).encode('a red square').ids == world.pieces('a red square')


@pytest.mark.parametrize('call, words', [
    (lambda t: t.encode('a red square'), 'list of texts'),
    (lambda t: t.encode(['a', 3]), 'list of texts'),
    (lambda t: t.encode(['a'], max_len=1), 'max_len=1'),
    (lambda t: WordTokenizer(['red', 'Red']), "'red' is not one"),
    (lambda t: WordTokenizer(['two words']), 'two words'),
    (lambda t: WordTokenizer(['<eos>']), '<eos>'),
    (lambda t: published_caption_ids(t, ['a'], 0), 'max_len=0'),
    (lambda t: mask_words(torch.ones(1, 2).long(), torch.ones(1, 2).bool(), mask_id=1), 'vocab_size'),
])
def test_wrong_use(world, call, words):
    with pytest.raises(ValueError, match=words): call(world)


# ---- the released text pipeline ----

@quick
@given(texts=st.lists(st.text(alphabet='ared squ!\n', max_size=15), min_size=1, max_size=4), max_len=st.integers(1, 30))
def test_published_rows_are_the_wrapped_string_cut_and_padded_with_zero(texts, max_len):
    tokenizer = byte_pair_tokenizer(MERGES)
    end, blank = tokenizer.eos_id, 220
    ids, mask = published_caption_ids(tokenizer, texts, max_len)
    assert ids.shape == (len(texts), max_len)
    for text, row, keep in zip(texts, ids.tolist(), mask.tolist()):
        middle = tokenizer.pieces(f' {text} ')
        assert [i for i, k in zip(row, keep) if k] == [end, *middle, end][:max_len]
        assert all(i == 0 for i, k in zip(row, keep) if not k)
    assert published_caption_ids(tokenizer, ['red'], 9)[0][0, :4].tolist() == [end, 259, blank, end]


# ---- masking ----

def slow_mask(ids, keep, draws, mask_id):
    "The recipe, token by token"
    seen, labels = ids.clone(), torch.full_like(ids, -100)
    for b in range(len(ids)):
        for n in range(ids.shape[1]):
            if not keep[b, n] or not draws['choose'][b, n]: continue
            labels[b, n] = ids[b, n]
            if draws['hide'][b, n]: seen[b, n] = mask_id
            elif draws['swap'][b, n]: seen[b, n] = draws['word'][b, n]
    return seen, labels


@quick
@given(b=st.integers(1, 4), n=st.integers(1, 9), seed=st.integers(0, 999))
def test_masking_is_the_recipe(b, n, seed):
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (b, n), generator=dice)
    keep = torch.rand(b, n, generator=dice) < .8
    draws = mask_draws((b, n), 40, rate=.5, hide=.5, generator=dice)
    got, want = mask_words(ids, keep, mask_id=4, draws=draws), slow_mask(ids, keep, draws, 4)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    as_floats = {k: v.float() if v.dtype == torch.bool else v for k, v in draws.items()}   # recorded dice come as 0. and 1.
    assert torch.equal(mask_words(ids, keep, mask_id=4, draws=as_floats)[0], got[0])
    assert torch.equal(torch.where(got[1] >= 0, got[1], got[0]), ids)


def test_masking_shares_and_seeds():
    ids = torch.full((400, 200), 50)
    play = lambda seed: mask_words(ids, ids > 0, mask_id=4, vocab_size=500, generator=torch.Generator().manual_seed(seed))
    seen, labels = play(0)
    asked = labels >= 0
    assert asked.float().mean().item() == pytest.approx(.15, abs=.005)
    assert (seen[asked] == 4).float().mean().item() == pytest.approx(.8, abs=.02)
    assert (seen[asked] == 50).float().mean().item() == pytest.approx(.1, abs=.015)
    assert (seen[~asked] == 50).all()
    assert torch.equal(seen, play(0)[0]) and not torch.equal(seen, play(1)[0])


def slow_choice(starts, keep, budget, order):
    "The recipe of whole-word masking, word by word"
    words = []
    for n in range(len(keep)):
        if not keep[n]: continue
        if starts[n] or not words: words.append([])
        words[-1].append(n)
    chosen = []
    for i in order:
        if i < len(words) and len(chosen) + len(words[i]) <= budget: chosen += words[i]
    return sorted(chosen)


@quick
@given(n=st.integers(1, 12), budget=st.integers(0, 6), seed=st.integers(0, 999))
def test_whole_words_are_chosen_in_order_while_they_fit(n, budget, seed):
    dice = torch.Generator().manual_seed(seed)
    starts, keep = torch.rand(2, n, generator=dice) < .6, torch.rand(2, n, generator=dice) < .9
    orders = [torch.randperm(len(word_groups(s.tolist(), k.tolist())), generator=dice).tolist() for s, k in zip(starts, keep)]
    chosen = choose_words(starts, keep, budget, orders=orders)
    assert not (chosen & ~keep).any()
    for b in range(2): assert chosen[b].nonzero().flatten().tolist() == slow_choice(starts[b], keep[b], budget, orders[b])


def test_pieces_of_a_word_are_asked_for_together(bert):
    ids, _ = bert.encode(['a red triangle left of the circle', 'the rects'])
    starts, keep = bert.word_starts(ids), bert.maskable(ids)
    for seed in range(30):
        seen, labels = mask_whole_words(ids, starts, keep, mask_id=bert.mask_id, vocab_size=bert.vocab_size, rate=.3,
                                        generator=torch.Generator().manual_seed(seed))
        asked = labels >= 0
        for row in range(2):
            for word in word_groups(starts[row].tolist(), keep[row].tolist()): assert asked[row, word].float().mean() in (0, 1)
        assert (asked.sum(1) <= torch.tensor([max(1, round(.3*k)) for k in keep.sum(1).tolist()])).all()
        assert not (asked & ~keep).any() and torch.equal(seen[~asked], ids[~asked])


def test_padding_as_candidates_leaves_captions_without_a_question():
    "VLC's budget counts padding: 10 real pieces of 38 candidates, 6 drawn, none real in 13.6 % of draws"
    keep = torch.ones(20_000, 38, dtype=torch.bool)
    chosen = choose_words(keep, keep, 6, generator=torch.Generator().manual_seed(0))
    assert (~chosen[:, :10].any(1)).float().mean().item() == pytest.approx(math.comb(28, 6)/math.comb(38, 6), abs=.01)
