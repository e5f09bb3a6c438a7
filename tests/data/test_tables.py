"The authors' arrow tables: every kind written here as their scripts write it, read, broken, and written by us."
import pickle
import pyarrow as pa
import pytest
import torch
from PIL import Image
from vl_tutor.data.annotations import Problems, check_dataset, read_dataset, read_records
from vl_tutor.data.containers import picture_bytes
from vl_tutor.data.tables import (FORMATS, TABLES, TableData, TableRows, open_table, open_tables, published_batch, retrieval_order, 
                                  table_answers, table_files, write_tables)
from vl_tutor.training.learner import dict_loaders
from vl_tutor.world.tasks import make_task

texts = pa.list_(pa.string())


def png(shade=0, w=12, h=8): return picture_bytes(Image.new('RGB', (w, h), (shade, 0, 0)))


def put(folder, name, columns, schema=None):
    "One table as the authors' scripts write it: one batch, the metadata of pandas"
    import pandas as pd
    table = pa.Table.from_pydict(columns, pa.schema(schema)) if schema else pa.Table.from_pandas(pd.DataFrame(columns))
    with pa.OSFile(str(folder/f'{name}.arrow'), 'wb') as sink, pa.RecordBatchFileWriter(sink, table.schema) as out: out.write_table(table)
    return folder/f'{name}.arrow'


def captions(folder, name, rows, first=0):
    return put(folder, name, dict(image=[png(first + k) for k in range(len(rows))], caption=rows,
                                  image_id=[f'COCO_val2014_{first + k:012d}.jpg' for k in range(len(rows))], split=['train']*len(rows)))


QUESTIONS = dict(image=lambda: png(), questions=['how many ?', 'red ?'], answers=[['2'], ['yes', 'no']], answer_labels=[[0], [1, 2]],
                 answer_scores=[[1.], [1., .3]], image_id=7, question_id=[70, 71], split='train')


def questions(folder, name, n=1, **changes):
    row = QUESTIONS | dict(image=png()) | changes
    return put(folder, name, {k: [v]*n for k, v in row.items()})


def pairs(folder, name, **changes):
    row = dict(image_0=png(1), image_1=png(2), questions=['both red', 'one green'], answers=['True', 'False'], identifier=f'{name}-0') | changes
    return put(folder, name, {k: [v] for k, v in row.items()})


# ---- read ----

def test_captions_are_one_item_each_in_the_order_of_the_file(tmp_path):
    captions(tmp_path, 'coco_caption_karpathy_train', [['b', 'a', 'b'], ['c']])
    captions(tmp_path, 'coco_caption_karpathy_restval', [['d', 'e']], 2)
    data = open_tables(tmp_path, 'coco', size=8)
    assert [data.records.place(i) for i in range(len(data))] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert [data[i]['caption'] for i in range(5)] == ['b', 'a', 'c', 'd', 'e']
    assert data[0]['captions'] == ['b', 'a'] and data[4]['source'] == 'coco_caption_karpathy_restval.arrow, row 0'
    assert [int(data[i]['image'][0, 0, 0]) for i in range(5)] == [0, 0, 1, 2, 2]
    batch = data.batch([4, 0])
    assert batch['image'].shape == (2, 3, 8, 8) and batch['caption'] == ['e', 'b']


def test_read_dataset_gives_a_record_for_each_picture(tmp_path):
    captions(tmp_path, 'coco_caption_karpathy_test', [['b', 'a', 'b'], ['c']])
    data = read_dataset(tmp_path, 'vilt_tables', 'test', size=8)
    assert [r['captions'] for r in data.records] == [['b', 'a'], ['c']]
    assert [r['caption'] for r in read_records(tmp_path, 'vilt_tables', 'valid', each=True)] == ['b', 'a', 'c']     # valid is test: the authors' rule
    found = check_dataset(tmp_path, 'vilt_tables')
    assert set(found['splits']) == {'valid', 'test'} and found['broken'] == 0


def test_every_data_set_has_its_files(tmp_path):
    for name, splits in TABLES.items():
        for split, patterns in splits.items():
            folder = tmp_path/name/split
            folder.mkdir(parents=True)
            names = [p.replace('_[0-9][0-9]', '_10').replace('_[0-9]', '_2').replace('_[01]', '_1') for p in patterns]
            for n in names: (folder/f'{n}.arrow').touch()
            assert [f.stem for f in table_files(folder, name, split)] == names


def test_questions(tmp_path):
    questions(tmp_path, 'vqav2_train', 2)
    put(tmp_path, 'vqav2_trainable_val', {k: [] for k in QUESTIONS}, [(k, pa.int64() if k == 'image_id' else pa.null()) for k in QUESTIONS])
    data = open_tables(tmp_path, 'vqav2', size=8)
    assert [s.type for s in data.records.table.schema if s.name == 'image'] == [pa.binary()]
    assert len(data) == 4
    sample = data[1]
    assert (sample['question'], sample['answer'], sample['answers'], sample['labels'], sample['scores'], sample['question_id']) == \
        ('red ?', 'yes', ['yes', 'no'], [1, 2], [1., .3], 71)
    assert table_answers(data) == {'2': 0, 'yes': 1, 'no': 2}
    assert {f.name: f.task for f in FORMATS} == dict(vilt_tables='caption', vilt_questions='question', vilt_pairs='pair')
    assert [r['question'] for r in read_records(tmp_path, 'vilt_questions')] == ['how many ?', 'red ?']*2


def test_questions_of_the_test_set_have_no_answers(tmp_path):
    nothing = pa.list_(pa.null())
    kinds = dict(image=pa.binary(), questions=texts, answers=nothing, answer_labels=nothing, answer_scores=nothing, image_id=pa.int64(),
                 question_id=pa.list_(pa.int64()), split=pa.string())
    put(tmp_path, 'vqav2_test', {k: [v] for k, v in (QUESTIONS | dict(image=png(), answers=[], answer_labels=[], answer_scores=[])).items()}, list(kinds.items()))
    sample = open_tables(tmp_path, 'vqav2', 'test', size=8)[1]
    assert (sample['answers'], sample['scores'], sample['answer'], sample['question_id']) == ([], [], '', 71)
    questions(tmp_path, 'more')
    both = TableData([tmp_path/'more.arrow', tmp_path/'vqav2_test.arrow'], size=8)                # list<null> beside list<list<…>>
    assert [both[i]['answers'] for i in range(4)] == [['2'], ['yes', 'no'], [], []]


def test_pairs(tmp_path):
    for name in ('nlvr2_dev', 'nlvr2_test1'): pairs(tmp_path, name)
    data = open_tables(tmp_path, 'nlvr2', 'valid', size=8)
    assert [(data[i]['text'], data[i]['label'], data[i]['table']) for i in (1, 2)] == [('one green', 0, 'nlvr2_dev'), ('both red', 1, 'nlvr2_test1')]
    assert data.batch([0, 3])['pair'].shape == (2, 2, 3, 8, 8)
    assert len(read_dataset(tmp_path, 'vilt_pairs', 'test', size=8)) == 4


def test_visual_genome_has_boxes(tmp_path):
    put(tmp_path, 'vg', dict(image=[png()], caption=[['b', 'a', 'b']], width=[[2, 3, 9]], height=[[2]*3], x=[[1, 2, 0]], y=[[0]*3], image_id=['5']))
    sample = open_tables(tmp_path, 'vg', size=24)[1]
    assert sample['captions'] == ['b', 'a'] and sample['boxes'].tolist() == [[2, 0, 6, 6], [4, 0, 10, 6]]


def test_retrieval_order(tmp_path):
    captions(tmp_path, 'coco_caption_karpathy_test', [['b', 'a', 'b'], ['c']], 30)
    order = retrieval_order(open_tables(tmp_path, 'coco', 'test'))
    assert (order['images'], order['owner'].tolist(), order['texts'], order['iid']) == ([0, 1], [0, 0, 1], ['b', 'a', 'c'], [30, 30, 31])


def test_workers_and_copies_open_their_own(tmp_path):
    captions(tmp_path, 'vg', [['b', 'a'], ['c']])
    data = open_tables(tmp_path, 'vg', size=8)
    again = pickle.loads(pickle.dumps(data.records))
    assert [again[i]['caption'] for i in range(3)] == ['b', 'a', 'c'] and bytes(again[2]['image']) == png(1)
    batches = [list(dict_loaders(data, data, bs=2, workers=w).valid) for w in (0, 2)]
    assert all(torch.equal(a['image'], b['image']) for a, b in zip(*batches, strict=True))


# ---- broken ----

@pytest.mark.parametrize('make,says', [
    (lambda f: captions(f, 'vg', [['a'], []]), 'row 1: its texts are'),
    (lambda f: captions(f, 'vg', [['a'], None]), 'row 1: its texts are None'),
    (lambda f: captions(f, 'vg', [['a'], ['  ']]), 'row 1: its texts are'),
    (lambda f: questions(f, 'vg', question_id=[1]), 'row 0: 2 questions have 1 question_id'),
    (lambda f: questions(f, 'vg', answers=[['2']]), 'row 0: 2 questions have 1 answers'),
    (lambda f: questions(f, 'vg', answer_labels=[[0], [1]]), 'row 0: answers, labels and scores are not equally many'),
    (lambda f: pairs(f, 'vg', answers=['True', 'maybe']), 'row 0: its answers are'),
    (lambda f: put(f, 'vg', dict(image=[png()], words=['a'])), 'neither captions, questions nor pairs')])
def test_a_broken_row_is_named(tmp_path, make, says):
    file = make(tmp_path)
    with pytest.raises(ValueError) as e: TableRows([file])
    assert says in str(e.value) and 'vg.arrow' in str(e.value) and '\n' not in str(e.value)


def test_skip_counts(tmp_path):
    file = captions(tmp_path, 'vg', [['a'], [], ['b', 'c']])
    data = TableData([file], size=8, on_error='skip')
    assert [data[i]['caption'] for i in range(len(data))] == ['a', 'b', 'c'] and data.problems.count == 1
    found = check_dataset(tmp_path, 'vilt_tables')['splits']['train']
    assert (found['records'], found['broken']) == (2, 1)


@pytest.mark.parametrize('bad', [None, b'', b'no picture', png()[:40]])
def test_a_broken_picture(tmp_path, bad):
    put(tmp_path, 'vg', dict(image=[png(), bad], caption=[['a'], ['b']]))
    data = open_tables(tmp_path, 'vg', size=8)
    with pytest.raises(ValueError, match='vg.arrow, row 1: '): data[1]
    data = open_tables(tmp_path, 'vg', size=8, on_error='skip')
    assert data.batch([0, 1])['caption'] == ['a'] and data.problems.count == 1
    found = check_dataset(tmp_path, 'vilt_tables')['splits']['train']
    assert (found['records'], found['broken']) == (1, 1)


def test_no_cut_or_flipped_file_crashes(tmp_path):
    file = captions(tmp_path, 'vg', [['one'], ['two', 'three']])
    data, dice = file.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(data) - 1, 97):
        (tmp_path/'cut.arrow').write_bytes(data[:n])
        with pytest.raises(ValueError, match='cut.arrow is no whole arrow file'): open_table(tmp_path/'cut.arrow')
    for _ in range(150):
        broken = bytearray(data)
        for place in torch.randint(len(data), (3,), generator=dice).tolist(): broken[place] ^= 255
        (tmp_path/'cut.arrow').write_bytes(broken)
        try: rows = TableRows([tmp_path/'cut.arrow']); [bytes(rows[i]['image']) for i in range(len(rows))]
        except ValueError as error: assert '\n' not in str(error)


def test_wrong_requests(tmp_path):
    captions(tmp_path, 'coco_caption_karpathy_train', [['a']])
    with pytest.raises(ValueError, match='no coco_caption_karpathy_restval.arrow'): open_tables(tmp_path, 'coco')
    with pytest.raises(ValueError, match="no tables 'cocoa'"): open_tables(tmp_path, 'cocoa')
    with pytest.raises(ValueError, match="sbu has no split 'test'"): open_tables(tmp_path, 'sbu', 'test')
    with pytest.raises(ValueError, match='has no coco_caption_karpathy_test.arrow'): open_tables(tmp_path, 'coco', 'test')
    questions(tmp_path, 'other')
    with pytest.raises(ValueError, match='are of two kinds'): TableData([tmp_path/'coco_caption_karpathy_train.arrow', tmp_path/'other.arrow'])
    captions(tmp_path, 'nlvr2_train', [['a']])
    with pytest.raises(ValueError, match='holds captions, not pairs'): list(read_records(tmp_path, 'vilt_pairs'))


def test_a_link_that_leads_out_is_refused(tmp_path):
    captions(tmp_path, 'real', [['a']])
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'vg.arrow').symlink_to(tmp_path/'real.arrow')
    with pytest.raises(ValueError, match='leads out'): open_tables(tmp_path/'data', 'vg')


# ---- write ----

@pytest.mark.parametrize('name,dataset', [('caption', 'vg'), ('question', 'vgqa'), ('statement_pair', 'nlvr2')])
def test_the_world_as_a_table(tmp_path, name, dataset):
    task = make_task(name, size=20)
    file = tmp_path/f'{dict(vg="vg", vgqa="vgqa_train", nlvr2="nlvr2_train")[dataset]}.arrow'
    assert write_tables((task[i] for i in range(20)), file) == 20
    data, k = open_tables(tmp_path, dataset), 0
    for i in range(len(data)):
        sample = data[i]
        truth = task[sample['row']]
        field = 'pair' if dataset == 'nlvr2' else 'image'
        assert torch.equal(sample[field], truth[field])
        for field in ('captions', 'question', 'text', 'label', 'answer'):
            if field in truth: assert sample[field] == truth[field]
    assert sorted(tmp_path.iterdir()) == [file]


def test_questions_about_one_file_share_a_row_and_files_are_copied(tmp_path):
    (tmp_path/'a.png').write_bytes(png(9))
    (tmp_path/'b.png').write_bytes(png(8))
    records = [dict(image=f, question=f'{q} ?', answer='yes', answers=['yes'], scores=[1.], question_id=q) for f, q in (('a.png', 1), ('a.png', 2), ('b.png', 3))]
    assert write_tables(records, tmp_path/'vgqa_train.arrow', root=tmp_path) == 2
    table = open_table(tmp_path/'vgqa_train.arrow')
    assert table['question_id'].to_pylist() == [[1, 2], [3]] and table['image'].to_pylist() == [png(9), png(8)]
    theirs = pa.ipc.RecordBatchFileReader(pa.memory_map(str(tmp_path/'vgqa_train.arrow'))).read_all()          # how the authors open it
    assert theirs.schema.field('answer_scores').type == pa.list_(pa.list_(pa.float64())) and theirs.num_rows == 2


def test_a_table_is_whole_or_not_there(tmp_path):
    def stops():
        yield dict(image=png(), caption='a')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_tables(stops(), tmp_path/'vg.arrow')
    with pytest.raises(ValueError, match='no record'): write_tables([], tmp_path/'vg.arrow')
    with pytest.raises(ValueError, match='fits no table'): write_tables([dict(video=1)], tmp_path/'vg.arrow')
    with pytest.raises(ValueError, match='not a JPEG'): write_tables([dict(image=b'x', caption='a')], tmp_path/'vg.arrow')
    with pytest.raises(ValueError, match='leads out'): write_tables([dict(image='../x.png', caption='a')], tmp_path/'vg.arrow', root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_authors_names(tmp_path):
    from vl_tutor.world.tasks import task_tokenizer
    captions(tmp_path, 'vg', [['red disc', 'blue square'], ['red']])
    data = open_tables(tmp_path, 'vg', size=8)
    batch, other = data.batch([0, 2]), data.batch([1, 1])
    mask = lambda ids, keep: (ids*0, torch.where(keep, ids, -100))
    named = published_batch(batch, task_tokenizer(), length=6, mask=mask, others=[other])
    assert named['image'][0] is batch['image'] and named['text'] == ['red disc', 'red'] and named['text_ids'].shape == (2, 6)
    assert named['text_masks'].sum(1).tolist() == [4, 3] and (named['text_labels'] == -100).all()
    assert (named['text_ids_mlm'] == 0).all() and named['false_text_0'] == ['blue square']*2 and named['false_image_0'][0] is other['image']
    assert named['replica'] == [False, False] and named['cap_index'].tolist() == [0, 0] and named['img_index'].tolist() == [0, 1]
