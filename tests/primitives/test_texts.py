"Texts: CLIP's byte pairs against open_clip and by hand, cleaning and cutting on any text, prompts that keep their slot, one-sentence errors."
import gzip
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vl_tutor.primitives.texts import (LABELS, MARKERS, PROMPTS, ClipPairs, caption_batch, clean_text, clip_text, cut_ids, ended_ids, fixed_ids,
                                       read_merges, retrieval_batch, simla_answers, simla_caption, simla_ids, simla_question, slot_prompt)
from vl_tutor.primitives.words import PieceTokenizer

quick = settings(max_examples=60, deadline=None, derandomize=True)
PIECES = '[PAD] [CLS] [SEP] [MASK] [UNK] a red blue square tri ##angle circ ##le is what left'.split()
FILE = Path(find_spec('open_clip').origin).parent/'bpe_simple_vocab_16e6.txt.gz'
MERGES = ['r e', 're d</w>', 'c u', 'b e</w>', 'cu be</w>', 's t', 'st a', 'sta r</w>']


def theirs():
    "open_clip's tokeniser, without importing the models beside it"
    spec = spec_from_file_location('open_clip_tokenizer', FILE.parent/'tokenizer.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(FILE))


@pytest.fixture(scope='module')
def clip(): return ClipPairs(read_merges(FILE))


@pytest.fixture(scope='module')
def small(): return ClipPairs(MERGES)


@pytest.fixture(scope='module')
def bert():
    from transformers import BertTokenizer
    return PieceTokenizer(BertTokenizer(vocab={w: i for i, w in enumerate(PIECES)}))


def small_pairs():
    if 'small' not in _shared: _shared['small'] = ClipPairs(MERGES)
    return _shared['small']


_shared = {}     # what the properties below make once


def one_sentence(error): return '\n' not in str(error.value) and len(str(error.value)) < 400


# ---- CLIP's byte pairs ----

LINES = ['a photo of a cat.', "It's the dog's 2nd toy, isn't it?", 'naïve café — ÆØÅ 赤い四角', '  Tabs\tand\nnew  lines ', '&lt;b&gt; 3 &amp;amp; 4', 'supercalifragilistic 12,345.67',
         'emoji 😀😀 text', "we'll they've I'm you'd 're", '#hash_tag @me http://x.y/z?q=1', '…“quotes”‘’', 'ﬁne ﬂow', 'ÃŸ broken encoding', '𝔘𝔫𝔦𝔠𝔬𝔡𝔢', 'a'*70]


def test_same_ids_as_open_clip(clip):
    oracle = theirs()
    for line in LINES: assert clip.pieces(line) == oracle.encode(line), line
    assert (clip.vocab_size, clip.spe_id, clip.eos_id) == (49411, 49410, 49407)


@quick
@given(text=st.text(max_size=40).filter(lambda t: '<' not in t))
def test_same_ids_as_open_clip_on_any_text(text):
    text = text.encode('utf-8', 'ignore').decode()
    if not {'theirs', 'ours'} <= set(_shared): _shared.update(theirs=theirs(), ours=ClipPairs(read_merges(FILE)))
    assert _shared['ours'].pieces(text) == _shared['theirs'].encode(text)


@quick
@given(word=st.text(alphabet='redcubstaé赤😀', min_size=1, max_size=12))
def test_fast_and_slow_pieces_agree(word):
    small = small_pairs()
    assert small.word_ids(word) == small.word_ids_ref(word) == small.word_ids(word)


def test_fast_and_slow_agree_on_the_published_merges(clip):
    for word in ('extraordinarily', 'café', 'a', '!!', 'thunderstruck', '<|spe|>'): assert clip.word_ids(word) == clip.word_ids_ref(word)


@quick
@given(text=st.text(max_size=40).filter(lambda t: '<' not in t))
def test_there_and_back_is_the_cleaned_text(text):
    small = small_pairs()
    text = text.encode('utf-8', 'ignore').decode()
    assert small.text(small.pieces(text)).split(' ') == (' '.join(small.words(text))).split(' ')
    rows, _ = small.encode([text])
    assert small.decode(rows) == [' '.join(small.words(text))]


def test_a_remembered_word_is_not_changed_from_outside(small):
    first = small.word_ids('cubes')
    first.append(7)
    assert small.word_ids('cubes') == first[:-1]


def test_word_starts_follow_word_ends(small):
    ids, keep = small.encode(['redder cube', 'x'])
    starts = small.word_starts(ids)
    for row, ok, text in zip(starts, keep, ['redder cube', 'x']): assert int((row & ok).sum()) == len(small.words(text)) + 2


def test_merges_plain_and_packed_are_the_same(tmp_path):
    text = '#version: 0.2\n' + '\n'.join(MERGES) + '\n'
    (tmp_path/'a.txt').write_text(text)
    with gzip.open(tmp_path/'a.txt.gz', 'wt') as file: file.write(text)
    assert read_merges(tmp_path/'a.txt') == read_merges(tmp_path/'a.txt.gz') == MERGES
    assert read_merges(tmp_path/'a.txt', 3) == MERGES[:3]
    (tmp_path/'b.txt').write_text('\n'.join(MERGES))                       # without the line that names the version
    assert read_merges(tmp_path/'b.txt') == MERGES


@pytest.mark.parametrize('content,says', [(b'#version\nr e\nr e d\n', 'line 3'), (b'\xff\xfe\x00', 'cannot be read as text'), (None, 'no such file'), (b'#version\nr e\n' + b'x'*5000, 'line 3')])
def test_broken_merges_are_named(tmp_path, content, says):
    file = tmp_path/'pairs.txt'
    if content is not None: file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error: read_merges(file)
    assert 'pairs.txt' in str(error.value) and one_sentence(error)


def test_cut_off_and_false_packed_files_are_named(tmp_path):
    (tmp_path/'no.gz').write_bytes(b'not packed')
    (tmp_path/'half.gz').write_bytes(gzip.compress(b'#version\n' + b'r e\n'*9000)[:40])
    for name in ('no.gz', 'half.gz'):
        with pytest.raises(ValueError, match='cannot be read') as error: read_merges(tmp_path/name)
        assert name in str(error.value) and one_sentence(error)


def test_the_forgotten_marker_falls_apart(clip):
    for marker in MARKERS: assert (len(clip.pieces(marker)) == 1) == (marker != '<|mask|>'), marker


# ---- BERT's pieces ----

@quick
@given(text=st.lists(st.sampled_from('a red blue square triangle circle is what left nonsense'.split()), max_size=60).map(' '.join), length=st.integers(2, 45))
def test_fixed_rows_agree_with_transformers(text, length):
    from transformers import BertTokenizer
    if 'bert' not in _shared: _shared['bert'] = PieceTokenizer(BertTokenizer(vocab={w: i for i, w in enumerate(PIECES)}))
    bert = _shared['bert']
    ids, keep = fixed_ids(bert, [text], length)
    theirs = bert.inner(text, padding='max_length', truncation=True, max_length=length, return_special_tokens_mask=True)
    assert ids[0].tolist() == theirs['input_ids'] and keep[0].int().tolist() == theirs['attention_mask']
    marked = bert.inner.get_special_tokens_mask(theirs['input_ids'], already_has_special_tokens=True)
    assert [int(m) for m in ~bert.maskable(ids)[0] & (ids[0] != 4)] == [m if i != 4 else 0 for m, i in zip(marked, theirs['input_ids'])]


def test_simla_ids_have_no_end_but_answers_do(bert):
    ids, keep = simla_ids(bert, ['what is left', 'a ' * 40])
    assert ids.shape == (2, 25) and not (ids == bert.eos_id).any() and (ids[:, 0] == bert.bos_id).all() and keep[0].sum() == 4
    assert simla_ids(bert, ['a'], 30, full=True)[0].shape == (1, 30)
    ids, keep = simla_answers(bert, ['red', 'blue square', 'triangle'])
    assert [row[k][-1] == bert.eos_id for row, k in zip(ids, keep)] == [True]*3
    with pytest.raises(ValueError, match='give max_len'): simla_ids(bert, ['a'], None, full=True)


@quick
@given(text=st.text(alphabet="abC -/.,'!?\"()*#:;~<>\n\t", max_size=40), most=st.integers(1, 12))
def test_cleaning(text, most):
    for f in (simla_caption, simla_question, clean_text):
        once = f(text, most)
        assert not set(once) & set(".,'!?\"()*#:;~-/ABC") and len(once.split(' ')) <= most
    assert clean_text(text, most) == clean_text(clean_text(text, most), most)
    assert len(clean_text(text, most).split()) == min(most, len(clean_text(text, 1000).split()))


# ---- cutting, prompts, batches ----

@quick
@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=20), most=st.integers(1, 25))
def test_a_cut_keeps_beginning_and_end(ids, most):
    kept = cut_ids(ids, most)
    assert len(kept) == min(len(ids), most) and kept[-1] == ids[-1] and kept[:-1] == ids[:len(kept) - 1]


def test_ended_ids(small):
    assert ended_ids(small, 'red cube', 40) == [*small.pieces('red cube'), small.eos_id]
    assert ended_ids(small, '') == [small.eos_id]
    with pytest.raises(ValueError, match='no room'): ended_ids(small, 'red', 0)


@pytest.mark.parametrize('task', PROMPTS)
@pytest.mark.parametrize('words', [1, 30])
@pytest.mark.parametrize('most', [16, 256])
def test_a_prompt_keeps_its_slot_and_its_end(small, task, words, most):
    said = ['red '*words, 'cube star '*words][:1 + ('1' in PROMPTS[task].split())]
    if most == 16 and task not in ('MNLI', 'QQP', 'MRPC', 'VQA', 'VQA two ends') and words == 1: said = [s.strip() for s in said]
    try: ids, slot = slot_prompt(small, task, said, most)
    except ValueError as error: assert 'no room' in str(error) and most == 16; return
    assert len(ids) <= most and ids[slot] == small.spe_id and ids.count(small.spe_id) == 1 and ids[-1] == small.eos_id


def test_a_slot_in_the_sentence_is_not_the_slot(small):
    ids, slot = slot_prompt(small, 'VQA', ['red <|spe|> cube'])
    assert ids.count(small.spe_id) == 2 and slot == len(ids) - 2


def test_mistakes_in_prompts(small):
    for task, said, says in [('GLUE', ['a'], "no prompt for 'GLUE'"), ('RTE', ['a'], 'takes 2 sentences'), ('SST-2', ['a', 'b'], 'takes 1 sentences'), ('VQA', ['a'], 'no room')]:
        with pytest.raises(ValueError, match=says) as error: slot_prompt(small, task, said, 1 if says == 'no room' else 20)
        assert one_sentence(error)
    assert set(LABELS) < set(PROMPTS)


@quick
@given(captions=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5))
def test_caption_batch(captions):
    batch, n = caption_batch(captions, 50), max(map(len, captions))
    for row, keep, target, caption in zip(*(batch[k].tolist() for k in ('text', 'keep', 'targets')), captions):
        pad = [0]*(n - len(caption))
        assert row == caption + pad + [50]*len(caption) + pad
        assert keep == ([True]*len(caption) + [False]*len(pad))*2 and target == caption + [-1]*len(pad)


def test_retrieval_batch():
    batch = retrieval_batch([[[5, 6]], [], [[7], [8, 9, 1]]])
    assert batch['owner'].tolist() == [0, 2, 2] and batch['text'][2].tolist() == [8, 9, 1] and batch['keep'].sum(1).tolist() == [2, 1, 3]


def test_web_text():
    assert clip_text('Fish &amp;amp; CHIPS\xa0\n now') == 'fish & chips now'
    assert torch.equal(*[torch.tensor(len(clip_text(t))) for t in ('', '  ')])
