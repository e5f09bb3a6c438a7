"Question sets, statements, entailment and referring expressions: written as published, read as samples, and broken in every way that files break."
import json
import os
import pickle
import pytest
import torch
from PIL import Image
from vl_tutor.data.annotations import FIELDS, check_dataset, detect_format, read_dataset
from vl_tutor.data.quizzes import ENTAILMENT, nlvr2_pictures, perceiver_answer, read_answer_list, scored, simla_answers

RED, BLUE = (200, 30, 40), (20, 60, 220)


def picture(folder, path, colour=RED):
    (folder/path).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (20, 10), colour).save(folder/path, 'PNG')


def both(folder, first, second): picture(folder, first), picture(folder, second, BLUE)


def write(folder, path, content):
    (folder/path).parent.mkdir(parents=True, exist_ok=True)
    (folder/path).write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows): return '\n'.join(map(json.dumps, rows)) + '\n'
def coco(part, number): return f'{part}/COCO_{part}_{number:012d}.jpg'
def pickled(folder, path, content):
    (folder/path).parent.mkdir(parents=True, exist_ok=True)
    (folder/path).write_bytes(pickle.dumps(content, protocol=2))


# ---- the layouts: each holds two samples, red and blue ----

QUESTIONS = [dict(image_id=7, question='What colour is it?', question_id=7000), dict(image_id=9, question='Is it blue?', question_id=9001)]

def note(question, said, **more):
    answers = [dict(answer=a, answer_confidence='yes', answer_id=k + 1) for k, a in enumerate(said)]
    return dict(question_id=question['question_id'], image_id=question['image_id'], question_type='is it', answer_type='other',
                multiple_choice_answer=said[0], answers=answers) | more


def vqav2(f, part='train2014'):
    both(f, coco(part, 7), coco(part, 9))
    write(f, f'v2_OpenEnded_mscoco_{part}_questions.json', dict(info={}, data_type='mscoco', questions=QUESTIONS))
    notes = [note(QUESTIONS[0], ['red']*9 + ['pink']), note(QUESTIONS[1], ['blue']*8 + ['red']*2)]
    write(f, f'v2_mscoco_{part}_annotations.json', dict(info={}, annotations=notes))


def vqav2_val(f): vqav2(f, 'val2014')


def vqav2_test(f):
    both(f, coco('test2015', 7), coco('test2015', 9))
    write(f, 'v2_OpenEnded_mscoco_test2015_questions.json', dict(questions=QUESTIONS))


def vqav2_test_dev(f):
    both(f, coco('test2015', 7), coco('test2015', 9))
    write(f, 'questions/v2_OpenEnded_mscoco_test-dev2015_questions.json', dict(questions=QUESTIONS))


def lxmert(f):
    both(f, coco('train2014', 7), coco('val2014', 9))
    write(f, 'train.jsonl', lines([dict(img_id='COCO_train2014_000000000007', sent='What colour is it?', question_id=7000, label={'red': 1, 'pink': .3}, answer_type='other'),
                                   dict(img_id='COCO_val2014_000000000009', sent='Is it blue?', question_id=9001, label={'blue': 1.0})]))


def simla_vqa(f):
    both(f, 'train2014/7.jpg', 'vg/image/9.jpg')
    write(f, 'vqa_train.json', [dict(dataset='vqa', image='train2014/7.jpg', question='What colour is it?', question_id=7000, answer=['red']*9 + ['pink'])])
    write(f, 'vg_qa.json', [dict(dataset='vg', image='image/9.jpg', question='Is it blue?', question_id=9001, answer='blue')])


def simla_vqa_valid(f):
    both(f, 'val2014/7.jpg', 'val2014/9.jpg')
    write(f, 'vqa_val.json', [dict(dataset='vqa', image=f'val2014/{q["image_id"]}.jpg', question=q['question'], question_id=q['question_id'], answer=a)
                              for q, a in zip(QUESTIONS, (['red', 'pink'], ['blue']))])


def vg_qa(f):
    both(f, 'VG_100K/7.jpg', 'VG_100K_2/9.jpg')
    write(f, 'question_answers.json', [dict(id=7, qas=[dict(qa_id=7000, image_id=7, question='What colour is it?', answer='red', q_objects=[], a_objects=[])]),
                                       dict(id=9, qas=[dict(qa_id=9001, image_id=9, question='Is it blue?', answer='blue')])])


def uni_vqa(f):
    both(f, 'mscoco_dataset/coco_origin/' + coco('train2014', 7), 'mscoco_dataset/coco_origin/' + coco('train2014', 9))
    write(f, 'VQA/v2_OpenEnded_mscoco_train2014_questions.json', dict(questions=QUESTIONS[::-1]))
    write(f, 'VQA/v2_OpenEnded_mscoco_val2014_questions.json', dict(questions=[]))
    write(f, 'VQA/coco_map.json', {'7': coco('train2014', 7), '9': coco('train2014', 9)})
    pickled(f, 'VQA/trainval_label2ans.pkl', ['blue', 'red', 'pink'])
    pickled(f, 'VQA/train_target.pkl', [dict(question_id=7000, image_id=7, labels=[2, 1], scores=[.3, 1]), dict(question_id=9001, image_id=9, labels=[0], scores=[1])])
    pickled(f, 'VQA/val_target.pkl', [])


PAIRS = [('dev-7-0-0', 'both are red', True), ('dev-9-1-1', 'one is green', False)]

def nlvr2(f):
    for name, *_ in PAIRS: both(f, *(f'images/dev/{p}' for p in nlvr2_pictures(name)))
    write(f, 'data/dev.json', lines([dict(identifier=n, sentence=s, label=str(t), synset='dog', left_url='x') for n, s, t in PAIRS]))


def nlvr2_train(f):
    rows = [dict(identifier=n.replace('dev', 'train'), sentence=s, label=str(t), directory=k + 36) for k, (n, s, t) in enumerate(PAIRS)]
    for row in rows: both(f, *(f'images/train/{row["directory"]}/{p}' for p in nlvr2_pictures(row['identifier'])))
    write(f, 'data/train.json', lines(rows))


def nlvr2_test(f):
    for name, *_ in PAIRS: both(f, *(p.replace('dev', 'test1') for p in nlvr2_pictures(name)))
    write(f, 'test1.json', lines([dict(identifier=n.replace('dev', 'test1'), sentence=s, label=str(t)) for n, s, t in PAIRS]))


def nlvr2_balanced(f):
    for name, *_ in PAIRS: both(f, *(f'dev/{p}' for p in nlvr2_pictures(name)))
    write(f, 'nlvr2/data/balanced/balanced_dev.json', lines([dict(identifier=n, sentence=s, label=str(t)) for n, s, t in PAIRS]))


def nlvr2_simla(f):
    both(f, 'train/7a.png', 'train/7b.png')
    both(f, 'train/9a.png', 'train/9b.png')
    write(f, 'nlvr_train.json', [dict(images=[f'train/{k}a.png', f'train/{k}b.png'], sentence=s, label=str(t)) for k, (_, s, t) in zip((7, 9), PAIRS)])


def snli_ve(f):
    both(f, 'flickr30k-images/77.jpg', 'flickr30k-images/99.jpg')
    write(f, 'snli_ve_dev.jsonl', lines([dict(Flickr30K_ID='77', captionID='77.jpg#0', gold_label='entailment', pairID='77.jpg#0e', sentence1='premise', sentence2='It is red.'),
                                         dict(Flickr30K_ID='99', captionID='99.jpg#0', gold_label='contradiction', pairID='99.jpg#0c', sentence1='premise', sentence2='It is red.')]))


def snli_simla(f):
    both(f, 'images/77.jpg', 'images/99.jpg')
    write(f, 've_train.json', [dict(image='77', sentence='It is red.', label='entailment'), dict(image='99', sentence='It is red.', label='contradiction')])


def refer(f, name='refcoco', by='unc', splits=('val', 'val'), protocol=2):
    both(f, 'images/mscoco/images/' + coco('train2014', 7), 'images/mscoco/images/' + coco('train2014', 9))
    images = [dict(id=k, file_name=coco('train2014', k).split('/')[1], width=20, height=10, license=1) for k in (7, 9)]
    things = [dict(id=70, image_id=7, bbox=[2, 1, 10.5, 4], category_id=1, segmentation=[[1, 2, 3, 4]], iscrowd=0), dict(id=71, image_id=7, bbox=[0, 0, 3, 3], category_id=1),
              dict(id=90, image_id=9, bbox=[5, 5, 4, 4], category_id=1)]
    refs = [dict(ref_id=1, ann_id=70, image_id=7, category_id=1, split=splits[0], file_name='COCO_train2014_000000000007_1.jpg', sent_ids=[1],
                 sentences=[dict(sent='the red one', raw='The red one!', sent_id=1, tokens=['the', 'red', 'one'])]),
            dict(ref_id=2, ann_id=90, image_id=9, category_id=1, split=splits[1], file_name='x', sent_ids=[2],
                 sentences=[dict(sent='blue, at the left', raw='', sent_id=2, tokens=[])])]
    write(f, f'{name}/instances.json', dict(images=images, annotations=things, categories=[dict(id=1, name='thing')]))
    (f/name/f'refs({by}).p').write_bytes(pickle.dumps(refs, protocol=protocol))


def refcoco(f): refer(f)
def refcoco_plus(f): refer(f, 'refcoco+', splits=('testA', 'testB'), protocol=0)
def refcocog(f): refer(f, 'refcocog', 'umd', protocol=1)


def grounding(f):
    refer(f, 'refcoco+')
    rows = [dict(image=f'images/mscoco/images/{coco("train2014", k)}', text=t, ref_id=n) for k, t, n in ((7, 'the red one', 1), (9, 'blue, at the left', 2))]
    write(f, 'refcoco+_test.json', rows)
    write(f, 'refcoco+/dets.json', {'7': [[2, 1, 10, 4, .9], [0, 0, 3, 3]], '9': [[5, 5, 4, 4]]})


LAYOUTS = [(vqav2, 'vqav2', 'train'), (vqav2_val, 'vqav2', 'val'), (vqav2_val, 'vqav2', 'rest_val'), (vqav2_test, 'vqav2', 'test'), (vqav2_test_dev, 'vqav2', 'test-dev'),
           (lxmert, 'lxmert_vqa', 'train'), (simla_vqa, 'simla_vqa', 'train'), (simla_vqa_valid, 'simla_vqa', 'valid'), (vg_qa, 'vg_qa', 'train'),
           (uni_vqa, 'uni_perceiver_vqa', 'train'), (nlvr2, 'nlvr2', 'valid'), (nlvr2_train, 'nlvr2', 'train'), (nlvr2_test, 'nlvr2', 'test'),
           (nlvr2_balanced, 'nlvr2', 'balanced_dev'), (nlvr2_simla, 'nlvr2', 'train'), (snli_ve, 'snli_ve', 'valid'), (snli_simla, 'snli_ve', 'train'), (refcoco, 'refcoco', 'val'),
           (refcoco_plus, 'refcoco+', 'test'), (refcocog, 'refcocog', 'val'), (grounding, 'simla_grounding', 'val')]
TASK = dict(nlvr2='pair', snli_ve='entailment', refcoco='expression', refcocog='expression', simla_grounding='expression') | {'refcoco+': 'expression'}
every = pytest.mark.parametrize('layout, format, split', LAYOUTS, ids=lambda x: getattr(x, '__name__', x))


def read(folder, format, split, **kw): return read_dataset(folder, format, split, **kw, **dict(least=1) if format == 'vqav2' else {})


def mean(image): return image.float().mean((-2, -1)).tolist()


# ---- as published ----

@every
def test_published_layout(layout, format, split, tmp_path):
    layout(tmp_path)
    data = read(tmp_path, format, split, size=8)
    assert len(data) == 2
    fields = set(FIELDS[TASK.get(format, 'question')].split()) - {'kind', 'image_id', 'question_id', 'proposals'}
    if split.startswith('test') and format == 'vqav2': fields -= {'answer'}
    for sample, colour in zip((data[0], data[1]), (RED, BLUE)):
        assert fields <= set(sample) and sample['source'].startswith(str(tmp_path))
        if 'pair' in sample: assert [*map(mean, sample['pair'])] == [[*map(float, RED)], [*map(float, BLUE)]]
        else: assert mean(sample['image']) == [*map(float, colour)]
    assert len(data.batch([0, 1])['source']) == 2


@pytest.mark.parametrize('layout, format, split', [x for x in LAYOUTS if TASK.get(x[1]) is None], ids=lambda x: getattr(x, '__name__', x))
def test_questions(layout, format, split, tmp_path):
    layout(tmp_path)
    first, second = read(tmp_path, format, split).records
    assert (first['question'], second['question']) == ('What colour is it?', 'Is it blue?')
    assert (first['question_id'], second['question_id']) == (7000, 9001)
    if split.startswith('test'): assert first['answers'] == first['scores'] == second['answers'] == [] and 'answer' not in first
    else:
        assert (first['answer'], second['answer']) == ('red', 'blue') and 'red' in first['answers']
        assert len(first['answers']) == len(first['scores']) and max(first['scores']) <= 1


def test_scores_of_each_layout(tmp_path):
    for layout, format, split, answers, scores in [(vqav2, 'vqav2', 'train', ['red'], [1.]), (lxmert, 'lxmert_vqa', 'train', ['red', 'pink'], [1., .3]),
                                                   (simla_vqa, 'simla_vqa', 'train', ['red', 'pink'], [.9, .1]), (uni_vqa, 'uni_perceiver_vqa', 'train', ['pink', 'red'], [.3, 1.])]:
        layout(tmp_path/format)
        record = read(tmp_path/format, format, split).records[0]
        assert (record['answers'], record['scores']) == (answers, scores)
    assert read(tmp_path/'simla_vqa', 'simla_vqa', 'train').records[1]['scores'] == [.5]
    assert read(tmp_path/'vqav2', 'vqav2', 'train').records[1] | {} == read(tmp_path/'vqav2', 'vqav2', 'train', vocabulary=['red', 'blue']).records[1]


def test_lxmert_and_simla_tests_have_no_answers(tmp_path):
    both(tmp_path, 'test2015/7.jpg', 'test2015/9.jpg')
    write(tmp_path, 'test.jsonl', lines([dict(img_id='7', sent='What?', question_id=1)]))
    write(tmp_path, 'vqa_test.json', [dict(dataset='vqa', image='test2015/9.jpg', question='What?', question_id=1)])
    for format in ('lxmert_vqa', 'simla_vqa'):
        record, = read(tmp_path, format, 'test').records
        assert record['answers'] == [] and 'answer' not in record


def test_uni_perceiver_cuts_three_thousand(tmp_path):
    uni_vqa(tmp_path)
    questions = [dict(image_id=7, question='Why?', question_id=k) for k in range(3004, -1, -1)]
    write(tmp_path, 'VQA/v2_OpenEnded_mscoco_val2014_questions.json', dict(questions=questions))
    pickled(tmp_path, 'VQA/val_target.pkl', [dict(question_id=k, image_id=7, labels=[1] if k != 1 else [], scores=[1] if k != 1 else []) for k in range(3005)])
    train, valid = (read(tmp_path, 'uni_perceiver_vqa', split).records for split in ('train', 'valid'))
    assert [r['question_id'] for r in train] == [7000, 9001, 0, 2, 3, 4]                  # question 1 has no answer
    assert [r['question_id'] for r in valid] == [*range(5, 3005)]
    write(tmp_path, 'VQA/VG_questions2.json', dict(questions=[dict(image_id=9, question='Where?', question_id=5)]))
    pickled(tmp_path, 'VQA/vg_target.pkl', [dict(question_id=5, image_id=9, labels=[0], scores=[1.])])
    assert len(read(tmp_path, 'uni_perceiver_vqa', 'train')) == 7


def test_statements_and_entailment(tmp_path):
    nlvr2(tmp_path), snli_ve(tmp_path)
    assert [(r['text'], r['label']) for r in read(tmp_path, 'nlvr2', 'valid').records] == [('both are red', 1), ('one is green', 0)]
    assert [(r['class_name'], r['label']) for r in read(tmp_path, 'snli_ve', 'valid').records] == [('entailment', 2), ('contradiction', 0)]
    assert ENTAILMENT == dict(contradiction=0, neutral=1, entailment=2)


# ---- broken ----

def annotation(folder, format='', split=''):
    "The list of records"
    files = [p for p in folder.rglob('*') if p.is_file() and p.suffix not in ('.jpg', '.png')]
    order = lambda p: ('questions' in p.name and 'train' in p.name or p.name.endswith(').p') or '_test.json' in p.name or p.name == 'vqa_train.json', 'questions' in p.name, p.stat().st_size)
    return max(files, key=lambda p: (p.name == 'refcoco+_test.json', *order(p)))


def skipping(folder, format, split):
    try: data = read(folder, format, split, on_error='skip')
    except ValueError as error: return str(error)
    return data


@every
def test_missing_picture(layout, format, split, tmp_path):
    layout(tmp_path)
    gone = sorted(p for p in tmp_path.rglob('*') if p.suffix in ('.jpg', '.png'))[0]
    gone.unlink()
    with pytest.raises(ValueError, match='is not there'): read(tmp_path, format, split)
    data = read(tmp_path, format, split, on_error='skip')
    assert len(data) == 1 and data.problems.count == 1 and gone.name in data.problems.first[0]


@every
def test_truncated_list(layout, format, split, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError) as caught: read(tmp_path, format, split)
    assert file.name in str(caught.value) and '\n' not in str(caught.value)
    if file.suffix == '.jsonl' or layout in (nlvr2, nlvr2_train, nlvr2_test, nlvr2_balanced):
        data = read(tmp_path, format, split, on_error='skip')
        assert len(data) == 1 and data.problems.count == 1 and 'line 2' in data.problems.first[0]


@every
@pytest.mark.parametrize('content', [b'', b'\xff\xfe\x00broken', b'[1, 2', b'"text"\n', b'[[[[' * 50_000, b'{}', b'[]', b'7\n', b'[null]', b'[[]]'], ids='empty binary open text deep object list number null nested'.split())
def test_another_content(layout, format, split, content, tmp_path):
    layout(tmp_path)
    annotation(tmp_path).write_bytes(content)
    if (layout, content) == (simla_vqa, b'[]'): assert len(read(tmp_path, format, split)) == 1; return       # its second list is whole
    with pytest.raises(ValueError) as caught: read(tmp_path, format, split)
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 600
    assert str(tmp_path) in str(skipping(tmp_path, format, split)) or layout is simla_vqa     # its second list is whole


@every
def test_not_utf8(layout, format, split, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    if file.suffix == '.p': return test_no_pickle(layout, format, split, tmp_path)
    file.write_bytes(file.read_bytes().replace(b'e', b'\xfc'))
    with pytest.raises(ValueError, match='UTF-8'): read(tmp_path, format, split)


def test_no_pickle(layout=refcoco, format='refcoco', split='val', tmp_path=None):
    if tmp_path is None: return
    (annotation(tmp_path)).write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match='no pickle of plain lists'): read(tmp_path, format, split)


@every
@pytest.mark.parametrize('change', ['missing', 'null', 'list', 'number'])
def test_fields_that_are_missing_or_wrong(layout, format, split, change, tmp_path):
    layout(tmp_path)
    file, wrong = annotation(tmp_path), 0
    is_lines = file.suffix == '.jsonl' or layout in (nlvr2, nlvr2_train, nlvr2_test, nlvr2_balanced)
    pickles = file.suffix == '.p'
    whole = pickle.loads(file.read_bytes()) if pickles else [json.loads(x) for x in file.read_text().splitlines()] if is_lines else json.loads(file.read_text())
    rows = whole.get('questions') if isinstance(whole, dict) else whole
    ignored = {'answer_type', 'synset', 'left_url', 'captionID', 'sentence1', 'pairID', 'category_id', 'file_name', 'sent_ids', 'directory'}
    for field in list(rows[0]):
        if field in ignored or field == 'label' and change != 'missing' and format == 'nlvr2' and change == 'null': continue
        kept = dict(rows[0])
        rows[0].pop(field)
        if change != 'missing': rows[0][field] = dict(null=None, list=[None], number=-1.5)[change]
        file.write_bytes(pickle.dumps(whole, 2) if pickles else (lines(rows) if is_lines else json.dumps(whole)).encode())
        with pytest.raises(ValueError) as caught: read(tmp_path, format, split)
        assert file.name in str(caught.value) and '\n' not in str(caught.value), field
        data = skipping(tmp_path, format, split)
        if len(rows) > 1 and not isinstance(data, str): assert len(data) == 1 and data.problems.count >= 1, field
        rows[0].clear(), rows[0].update(kept)
        wrong += 1
    assert wrong >= 2


@every
def test_twice(layout, format, split, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    if layout in (nlvr2_simla, snli_simla, grounding): return test_unnumbered_lists_may_repeat(tmp_path)
    if file.suffix == '.p':
        rows = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps(rows + rows[1:], 2))
    elif file.suffix == '.jsonl' or layout in (nlvr2, nlvr2_train, nlvr2_test, nlvr2_balanced): file.write_text(file.read_text() + file.read_text().splitlines()[-1])
    else:
        whole = json.loads(file.read_text())
        rows = whole['questions'] if isinstance(whole, dict) else whole
        rows.append(rows[-1])
        file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match='occurs twice'): read(tmp_path, format, split)
    data = read(tmp_path, format, split, on_error='skip')
    assert len(data) == 2 and data.problems.count == 1


def test_unnumbered_lists_may_repeat(tmp_path):
    nlvr2_simla(tmp_path/'more')
    file = tmp_path/'more'/'nlvr_train.json'
    file.write_text(json.dumps(json.loads(file.read_text())*2))
    assert len(read(tmp_path/'more', 'nlvr2', 'train')) == 4


@pytest.mark.parametrize('evil', ['/etc/passwd', '../secret', 'a/../../secret', 'C:\\secret', '\\\\host\\secret', 'link/secret'])
def test_paths_stay_inside(evil, tmp_path):
    folder, outside = tmp_path/'data', tmp_path/'outside'
    for name in ('secret', 'secret.jpg'): both(tmp_path, name, f'outside/{name}')
    folder.mkdir()
    os.symlink(outside, folder/'link')
    for layout, format, split, old in [(simla_vqa, 'simla_vqa', 'train', 'train2014/7.jpg'), (lxmert, 'lxmert_vqa', 'train', 'COCO_train2014_000000000007'), (snli_ve, 'snli_ve', 'valid', '77'),
                                       (uni_vqa, 'uni_perceiver_vqa', 'train', coco('train2014', 7)), (nlvr2_simla, 'nlvr2', 'train', 'train/7a.png'),
                                       (grounding, 'simla_grounding', 'val', 'images/mscoco/images/' + coco('train2014', 7)), (refcoco, 'refcoco', 'val', 'COCO_train2014_000000000007.jpg'),
                                       (nlvr2, 'nlvr2', 'valid', 'dev-7-0-0')]:
        layout(folder)
        bad = f'{evil}-1-2-3' if layout is nlvr2 else evil
        files = [p for p in folder.rglob('*.json*') if p.is_file() and f'"{old}"' in p.read_text()]
        assert files, layout
        for file in files: file.write_text(file.read_text().replace(f'"{old}"', json.dumps(bad)))
        with pytest.raises(ValueError, match='leads out of|is an absolute path|is not there') as caught: read(folder, format, split)
        if evil != 'link/secret' or layout is nlvr2_simla: assert layout is nlvr2 or 'not there' not in str(caught.value)
        data = read(folder, format, split, on_error='skip')
        assert len(data) == 1 and data.problems.count == 1
        for file in files: file.unlink()


@every
def test_unknown_split_and_nothing_there(layout, format, split, tmp_path):
    with pytest.raises(ValueError, match='has no'): read(tmp_path, format, split)
    layout(tmp_path)
    with pytest.raises(ValueError, match="has no split 'minival'"): read(tmp_path, format, 'minival')
    with pytest.raises(ValueError, match='is not a folder'): read(tmp_path/'gone', format, split)


@every
def test_check_reads_it_end_to_end(layout, format, split, tmp_path):
    layout(tmp_path)
    found = check_dataset(tmp_path, format, [split], **dict(least=1) if format == 'vqav2' else {})
    assert (found['records'], found['broken']) == (2, 0)
    assert found['splits'][split]['media']['files'] == (4 if 'nlvr2' in layout.__name__ else 2)


@pytest.mark.parametrize('row, words', [
    (dict(identifier='dev-7-0', sentence='x', label='True'), 'split-set-pair-sentence'), (dict(identifier='dev-7-0-0', sentence='x', label='maybe'), 'neither True nor False'),
    (dict(identifier='dev-7-0-0', sentence=' ', label='True'), 'sentence is'), (dict(identifier='dev-7-0-0', sentence='x', label=[]), 'label')])
def test_broken_statements(row, words, tmp_path):
    nlvr2(tmp_path)
    write(tmp_path, 'data/dev.json', lines([row]))
    with pytest.raises(ValueError, match='line 1') as caught: read(tmp_path, 'nlvr2', 'valid')
    assert words in str(caught.value)


def test_broken_answers(tmp_path):
    for answer in (None, 5, [], [1], {'a': 1}):
        with pytest.raises(ValueError, match='answer is'): simla_answers(answer, 'vqa')
    for score in (None, 'x', 1.5, -1, True, float('nan')):
        with pytest.raises(ValueError, match="score of 'red'"): scored({'red': score})
    uni_vqa(tmp_path)
    for labels, scores in (([3], [1]), ([-1], [1]), ([0], []), (['0'], [1])):
        pickled(tmp_path, 'VQA/train_target.pkl', [dict(question_id=7000, image_id=7, labels=labels, scores=scores), dict(question_id=9001, labels=[0], scores=[1])])
        with pytest.raises(ValueError, match='train_target.pkl, target 0'): read(tmp_path, 'uni_perceiver_vqa', 'train')
        data = read(tmp_path, 'uni_perceiver_vqa', 'train', on_error='skip')
        assert len(data) == 1 and data.problems.count == 1
    uni_vqa(tmp_path)
    write(tmp_path, 'VQA/coco_map.json', {'9': coco('train2014', 9)})
    with pytest.raises(ValueError, match='not in coco_map.json'): read(tmp_path, 'uni_perceiver_vqa', 'train', on_error='raise')


class Attack:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('name', ['train_target.pkl', 'trainval_label2ans.pkl'])
def test_hostile_targets_run_nothing(name, tmp_path):
    uni_vqa(tmp_path)
    pickled(tmp_path, f'VQA/{name}', [dict(question_id=7000, labels=Attack(tmp_path/'mark'), scores=[1])])
    with pytest.raises(ValueError, match='no pickle of plain lists: it asks for posix.system'): read(tmp_path, 'uni_perceiver_vqa', 'train', on_error='skip')
    assert not (tmp_path/'mark').exists()
    pickle.loads((tmp_path/'VQA'/name).read_bytes())                                      # the attack is a real one
    assert (tmp_path/'mark').exists()


# ---- small rules ----

@pytest.mark.parametrize('typed, clean', [('A dog.', 'dog'), ('the Red ball', 'red ball'), ('an apple', 'apple'), ('ten', '10'), ('one', '1'), ('grey', 'gray'), ('grey cat', 'grey cat'),
                                          ('two dogs', 'two dogs'), ('none', 'none'), ('', ''), ('a', 'a'), ('the .', 'the')])
def test_perceiver_answers(typed, clean): assert perceiver_answer(typed) == clean


def test_answer_list(tmp_path):
    write(tmp_path, 'answer_list.json', ['yes', 'no'])
    assert read_answer_list(tmp_path/'answer_list.json') == ['yes', 'no']
    write(tmp_path, 'trainval_ans2label.json', dict(no=1, yes=0))
    assert read_answer_list(tmp_path/'trainval_ans2label.json') == ['yes', 'no']
    for bad in ([], ['a', 'a'], ['a', 1], dict(a=0, b=0), dict(a=0, b=2), dict(a='0'), {}, 7, 'a', None):
        write(tmp_path, 'bad.json', json.dumps(bad))
        with pytest.raises(ValueError, match='bad.json'): read_answer_list(tmp_path/'bad.json')
