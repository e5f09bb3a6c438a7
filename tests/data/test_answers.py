"VQA answers: normalisation equal to the stored words, accuracy equal to an independent slow reading of the rules, vocabulary and soft scores, VQAv2's cuts."
import json
import random
import re
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vl_tutor.data.annotations import Problems, read_dataset
from vl_tutor.data.answers import (CONTRACTIONS, MARKS, NUMBERS, answer_vocabulary, gathered, last_images, normalise_answer, normalise_prediction, score_of, soft_answers,
                                   soft_targets, vqa_accuracy, vqa_accuracy_ref, vqa_evaluate, vqa_vocabulary, without_marks)

quick = settings(max_examples=60, deadline=None, derandomize=True)
words = st.sampled_from(['red', 'Red', 'a red', 'red!', 'two', '2', 'yes', 'no', 'none', "don't", 'dont', '3.5', '1,000', 'T-shirt', 't shirt', 'x.'])
typed = st.text(alphabet="aAn the2x3.,'!-/ ()\n\t?;\"_", max_size=24)


# ---- normalisation ----

STORED = {'Two': '2', 'the red ball': 'red ball', 'a  Cat.': 'cat', 'dont': "don't", '10,000': '10000', 'it is 3.5 m': 'it is 3.5 m', 'yes!': 'yes', 'on/off': 'on off', 'T-shirt': 't shirt',
          'an apple, a pear': 'apple pear', '"hello"': 'hello', 'none': '0', 'Zero': '0', 'next to (left)': 'next to left', 'whats that?': "what's that", '$5.00': '$5.00', 'isnt it': "isn't it",
          '2 1/2': '2 1 2', 'U.S.': 'us', '': ''}     # as ViLT's own code printed them


@pytest.mark.parametrize('text', STORED)
def test_stored_words(text): assert normalise_answer(text) == STORED[text]


def slow_normalise(text):
    "The published rules once more, mark by mark and word by word, written without looking at ours"
    result = []
    has_number = any(a.isdigit() and b == ',' and c.isdigit() for a, b, c in zip(text, text[1:], text[2:]))
    touching = {m for m in MARKS for a, b in zip(text, text[1:]) if (a, b) in ((m, ' '), (' ', m))}
    for letter in text:
        if letter not in MARKS: result.append(letter)
        elif not (has_number or letter in touching): result.append(' ')
    kept, stops = '', 0
    for k, letter in enumerate(result):
        following = result[k+1] if k + 1 < len(result) else ''
        if letter == '.' and not following.isdigit() and stops < 32: stops += 1
        else: kept += letter
    out = []
    for word in kept.lower().split():
        if word in NUMBERS: word = NUMBERS[word]
        if word in ('a', 'an', 'the'): continue
        out.append(CONTRACTIONS[word] if word in CONTRACTIONS else word)
    return ' '.join(out)


@quick
@given(typed)
def test_normalisation_follows_the_rules(text): assert normalise_answer(text) == slow_normalise(text)


def test_a_thirty_third_full_stop_stays(): assert without_marks('.'*40) == '.'*8


@quick
@given(typed)
def test_a_prediction_is_one_line(text):
    out = normalise_prediction(text)
    assert out == ' '.join(out.split()) and not re.search('[\n\t]', out)
    assert out == normalise_answer(re.sub('[\n\t]', ' ', text).strip())


def test_tables():
    assert len(CONTRACTIONS) == 114 and len(NUMBERS) == 12 and NUMBERS['ten'] == '10' and len(MARKS) == len(set(MARKS)) == 21
    assert all(k.replace("'", '') == v.replace("'", '') for k, v in CONTRACTIONS.items())
    assert CONTRACTIONS["somebody'd"] == 'somebodyd' and 'im' not in CONTRACTIONS and {"ow's'at", "'ows'at", "'ow'sat", 'twas', "y'allll"} <= set(CONTRACTIONS)


# ---- accuracy ----

def slow_accuracy(prediction, answers):
    "min(1, n/3) over every choice of the other annotators, from the definition"
    import numpy as np
    cleaned = [without_marks(a) for a in answers] if any(a != answers[0] for a in answers) else answers
    agree = np.array([a == slow_normalise(prediction.replace('\n', ' ').replace('\t', ' ').strip()) for a in cleaned])
    return float(np.mean([np.minimum(1, agree[[j for j in range(len(agree)) if j != k]].sum()/3) for k in range(len(agree))]))


@quick
@given(st.one_of(words, typed), st.lists(st.one_of(words, typed), min_size=1, max_size=12))
def test_accuracy(prediction, answers):
    for said in (answers, answers + [normalise_prediction(prediction)]*2):
        expected = slow_accuracy(prediction, said)
        assert vqa_accuracy(prediction, said) == pytest.approx(expected) and vqa_accuracy_ref(prediction, said) == pytest.approx(expected)
        assert 0 <= expected <= 1


@quick
@given(st.permutations(['red']*3 + ['blue']*5 + ['pink', 'teal']))
def test_the_order_of_annotators_does_not_matter(answers):
    assert [vqa_accuracy(a, answers) for a in ('red', 'blue', 'pink', 'grey')] == pytest.approx([.9, 1, .3, 0])


@pytest.mark.parametrize('count', range(11))
def test_scores_by_count(count):
    assert score_of(count) == [0, .3, .6, .9, 1][min(count, 4)]
    assert vqa_accuracy('q', ['q']*count + ['z']*(10 - count)) == pytest.approx(score_of(count))


def test_annotators_keep_their_capitals():
    assert vqa_accuracy('red', ['Red']*10) == 0 and vqa_accuracy('red', ['red!']*10) == 0        # all alike: not even marks go
    assert vqa_accuracy('red', ['red.']*9 + ['x']) == 1 and vqa_accuracy('red', ['red!']*9 + ['x']) == 0   # 'red ' keeps its space
    for f in (vqa_accuracy, vqa_accuracy_ref):
        with pytest.raises(ValueError, match='at least one annotator'): f('red', [])


def test_evaluate():
    records = [dict(question_id=1, kind='other', annotators=['red']*10), dict(question_id=2, kind='yes/no', annotators=['yes']*2 + ['no']*8)]
    found = vqa_evaluate({1: 'blue', 2: 'Yes.'}, records)
    assert found == pytest.approx({'overall': .3, 'other': 0, 'yes/no': .6})
    with pytest.raises(ValueError, match='question 2 has no prediction'): vqa_evaluate({1: 'red'}, records)
    assert vqa_evaluate({}, []) == {}


# ---- vocabulary and targets ----

def test_vocabulary():
    said = ['Yes']*5 + ['2']*3 + ['two']*6 + ['yes']*4 + ['rare']*8
    assert answer_vocabulary(said) == ['yes', '2'] and answer_vocabulary(said, 1) == ['yes', '2', 'rare'] and answer_vocabulary([]) == []


@quick
@given(st.lists(words, max_size=10), st.sets(words))
def test_soft_answers(answers, kept):
    names, scores = soft_answers(answers, kept)
    assert names == [a for a in dict.fromkeys(answers) if a in kept]
    assert scores == [score_of(answers.count(a)) for a in names]
    assert soft_answers(answers)[0] == list(dict.fromkeys(answers))


def test_soft_targets():
    y = soft_targets([['no', 'gone'], ['yes', 'no'], []], [[.6, 1], [1., .3], []], ['yes', 'no'])
    assert y.dtype == torch.float32 and torch.allclose(y, torch.tensor([[0, .6], [1, .3], [0, 0]]))


def test_gathered_names_what_is_broken():
    problems = Problems('skip')
    found = gathered([('a', dict(id=1)), ('b', dict(id=1)), ('c', dict(id='x')), ('d', 7), ('e', dict(id=2))], 'id', lambda row: row['id']*10, problems)
    assert found == {1: 10, 2: 20} and problems.count == 3 and problems.first[0] == 'b: id 1 occurs twice'


# ---- VQAv2 ----

def dataset(folder, part, rows):
    "rows: (picture, question, answers)"
    (folder/part).mkdir(parents=True, exist_ok=True)
    for image in {i for i, *_ in rows}: Image.new('RGB', (4, 4)).save(folder/part/f'COCO_{part}_{image:012d}.jpg', 'PNG')
    questions = [dict(image_id=i, question_id=q, question='What?') for i, q, _ in rows]
    notes = [dict(image_id=i, question_id=q, answer_type='other', multiple_choice_answer=max(said, key=said.count), answers=[dict(answer=a) for a in said]) for i, q, said in rows]
    (folder/f'v2_OpenEnded_mscoco_{part}_questions.json').write_text(json.dumps(dict(questions=questions)))
    (folder/f'v2_mscoco_{part}_annotations.json').write_text(json.dumps(dict(annotations=notes[::-1])))    # another order


def test_vocabulary_of_both_parts_and_dropped_questions(tmp_path):
    dataset(tmp_path, 'train2014', [(1, 10, ['red']*10), (1, 11, ['Two']*10), (2, 20, ['odd']*10)])
    dataset(tmp_path, 'val2014', [(3, 30, ['red']*6 + ['2']*4), (3, 31, ['two']*10)])
    assert vqa_vocabulary(tmp_path, 2) == ['2', 'red']                     # first seen: the annotations come in their own order
    train = read_dataset(tmp_path, 'vqav2', 'train', least=2).records
    assert [r['question_id'] for r in train] == [10]                       # 'Two' as typed is not '2', 'odd' is rare
    valid = read_dataset(tmp_path, 'vqav2', 'val', least=2).records
    assert [(r['question_id'], r['answer'], r['answers'], r['scores']) for r in valid] == [(30, 'red', ['red', '2'], [1., 1.])]
    assert valid[0]['annotators'] == ['red']*6 + ['2']*4 and valid[0]['kind'] == 'other'
    assert [r['question_id'] for r in read_dataset(tmp_path, 'vqav2', 'train', vocabulary=['odd', 'Two']).records] == [11, 20]
    with pytest.raises(ValueError, match='no record'): read_dataset(tmp_path, 'vqav2', 'train')          # nothing nine times


def test_last_thousand_pictures(tmp_path):
    rows = [(k//2, k, ['red']*10) for k in range(2010)] + [(2000, 9999, ['odd']*10)]
    records = [dict(image_id=i, question_id=q) for i, q, _ in rows[:-1]]
    rest, trainable = (list(last_images(records, split)) for split in ('rest_val', 'trainable_val'))
    assert {r['image_id'] for r in trainable} == {*range(5)} and len(rest) == 2000 and list(last_images(records, 'val')) == records
    dataset(tmp_path, 'val2014', rows[:6] + rows[-1:])                     # the last picture has no question left
    count = lambda split: len(read_dataset(tmp_path, 'vqav2', split, least=2))
    assert count('val') == count('rest_val') == 6
    with pytest.raises(ValueError, match='no record'): count('trainable_val')




@pytest.mark.parametrize('change, words', [
    (lambda q, a: a[0].update(image_id=7), 'annotation about 7'), (lambda q, a: a.pop(0), 'has no annotation'), (lambda q, a: a[0].update(answers=[]), 'empty list'),
    (lambda q, a: a[0].update(answers=[dict(text='x')]), "no field 'answer'"), (lambda q, a: a[0].update(answers=[7]), 'object with fields'), (lambda q, a: a[0].pop('multiple_choice_answer'), 'multiple_choice_answer'),
    (lambda q, a: a[1].update(question_id=a[0]['question_id']), 'occurs twice'), (lambda q, a: q[1].update(question_id=q[0]['question_id']), 'occurs twice'),
    (lambda q, a: q[0].update(question=' '), 'question is'), (lambda q, a: q[0].update(image_id=True), 'image_id is True'), (lambda q, a: q[0].update(image_id=99), 'is not there')])
def test_broken_annotations(change, words, tmp_path):
    dataset(tmp_path, 'val2014', [(1, 10, ['red']*10), (1, 11, ['red']*10), (2, 12, ['red']*10)])
    files = [tmp_path/'v2_OpenEnded_mscoco_val2014_questions.json', tmp_path/'v2_mscoco_val2014_annotations.json']
    wholes = [json.loads(f.read_text()) for f in files]
    change(wholes[0]['questions'], wholes[1]['annotations'])
    for file, whole in zip(files, wholes): file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=words) as caught: read_dataset(tmp_path, 'vqav2', 'val', least=1)
    assert re.search(r'json, (question|annotation) \d', str(caught.value)) and '\n' not in str(caught.value)
    data = read_dataset(tmp_path, 'vqav2', 'val', least=1, on_error='skip')
    assert len(data) in (1, 2) and data.problems.count in (1, 2) and len(data) + data.problems.count >= 3


def test_official_cut_is_ours_for_every_size():
    rng = random.Random(0)
    for n in (1, 2, 5):
        records = [dict(image_id=rng.randrange(6)) for _ in range(20)]
        both = [list(last_images(records, s, n)) for s in ('trainable_val', 'rest_val')]
        assert sum(map(len, both)) == 20 and not {r['image_id'] for r in both[0]} & {r['image_id'] for r in both[1]} and len({r['image_id'] for r in both[1]}) == n
