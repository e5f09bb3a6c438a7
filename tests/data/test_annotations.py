"Records and samples: what is broken is named and never replaced, batches are padded honestly, and files stand in for the world bit by bit."
import json
import math
import os
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from vl_tutor.data import annotations, records
from vl_tutor.data.annotations import (FIELDS, Absent, Annotated, Format, Problems, check_boxes, check_dataset, collate, csv_rows, detect_format, first_file, formats, inside,
                                       json_lines, need, once, padded, read_dataset, read_json, text_lines, texts)
from vl_tutor.training.learner import BatchLoader, collate as learners, dict_loaders, make_learner, quiet_fit

quick = settings(max_examples=40, deadline=None, derandomize=True)


def picture(folder, path, size=(20, 10), colour=(200, 30, 40)):
    (folder/path).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(folder/path, 'PNG')


def sentence(call, *args, **kw):
    "What the ValueError says, which is one line"
    with pytest.raises(ValueError) as caught: call(*args, **kw)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- what is wrong, in one sentence ----

def test_problems_raise_or_count():
    assert sentence(Problems(), 'a.csv, line 3', 'is odd') == 'a.csv, line 3: is odd'
    skip = Problems('skip', keep=2)
    for k in range(5): skip('a.csv', f'{k}')
    assert skip.count == 5 and skip.first == ['a.csv: 0', 'a.csv: 1']
    once_each = Problems('skip', heard=set())
    for _ in range(3): once_each('a', 'b')
    assert once_each.count == 1
    assert "choose 'raise' or 'skip'" in sentence(Problems, 'ignore')


@pytest.mark.parametrize('path, words', [('/etc/passwd', 'absolute'), ('\\x', 'absolute'), ('C:/x', 'absolute'), ('//host/x', 'absolute'), ('..', 'leads out'), ('a/../../x', 'leads out'), ('a\\..\\x', 'leads out'),
                                         ('', 'no path'), (' ', 'no path'), ('a\0b', 'no path'), (None, 'no path'), (5, 'no path'), ('out', 'by a link'), ('out/x', 'by a link'), ('in/../x', 'leads out')])
def test_paths_that_lead_out(path, words, tmp_path):
    (tmp_path/'data').mkdir()
    os.symlink(tmp_path, tmp_path/'data'/'out')
    assert words in sentence(inside, tmp_path/'data', path)


def test_paths_inside(tmp_path):
    (tmp_path/'data'/'deep').mkdir(parents=True)
    os.symlink(tmp_path/'data'/'deep', tmp_path/'data'/'link')                 # a link that stays inside is fine
    os.symlink(tmp_path/'data', tmp_path/'alias')                              # and so is a root that is one
    for root in (tmp_path/'data', tmp_path/'alias'):
        for path in ('x', 'deep/x', 'link/x', 'a..b', '...', 'ü/x', './x'): assert inside(root, path) == root/path
    (tmp_path/'database').mkdir()
    assert 'leads out' in sentence(inside, tmp_path/'data', '../database/x')


@quick
@given(st.text(max_size=12))
def test_no_text_leads_out(text):
    try: place = inside('/tmp', text)
    except ValueError as error: assert '\n' not in str(error).replace(repr(text), '')
    else: assert os.path.realpath(place).startswith('/tmp/') or os.path.realpath(place) == '/tmp'


@pytest.mark.parametrize('row, kinds, words', [(7, dict(a=int), 'not 7'), ({}, dict(a=int), "no field 'a'"), (dict(a='1'), dict(a=int), "a is '1'"), (dict(a=True), dict(a=int), 'a is True'), (dict(a=True), dict(a=(int, str)), 'a is True'),
                                               (dict(a=None), dict(a=str), 'a is None')])
def test_fields_that_are_missing_or_wrong(row, kinds, words): assert words in sentence(need, row, **kinds)


def test_fields():
    assert need(dict(a=1, b='x', c=[]), b=str, a=int) == ['x', 1] and need(dict(a=True), a=bool) == [True] and need(dict(a=3), a=None) == [3]
    assert texts(' a ') == ['a'] and texts(['a', 'b ']) == ['a', 'b']
    for bad in ('', [], ['a', ''], None, [1], {'a': 1}, 'a\udc80'): sentence(texts, bad)
    seen = set()
    once(seen, 1), once(seen, '1'), once(seen, (1, 'a'))
    assert 'id 1 occurs twice' in sentence(once, seen, 1) and 'no number or text' in sentence(once, seen, [1])


@pytest.mark.parametrize('content, words', [(b'', 'line 1: is not JSON'), (b'{"a":\n\n 1', 'line 3: is not JSON'), (b'\xff', 'is not UTF-8'), (b'[]', 'holds a list, not a dict'), (b'['*100_000, 'is not JSON'), (b'{"a": ' + b'9'*10_000 + b'}', 'is not JSON')])
def test_json_that_is_broken(content, words, tmp_path):
    (tmp_path/'x.json').write_bytes(content)
    found = sentence(read_json, tmp_path/'x.json', dict)
    assert words in found and str(tmp_path/'x.json') in found
    for place in (tmp_path/'gone.json', tmp_path): assert 'cannot be read' in sentence(read_json, place)


def test_lines_say_where_they_are(tmp_path):
    file = tmp_path/'x.txt'
    file.write_bytes(b'\xef\xbb\xbfone\r\n\n  \nt\xffwo\nthree')
    assert list(text_lines(file)) == [(f'{file}, line 1', 'one'), (f'{file}, line 4', None), (f'{file}, line 5', 'three')]
    assert 'cannot be read' in sentence(lambda: list(text_lines(tmp_path/'gone')))
    file.write_bytes(b'{"a": 1}\n{"a": \n\xff\n[[[\n5\n')
    skip = Problems('skip')
    assert [row for _, row in json_lines(file, skip)] == [dict(a=1), 5]
    assert [p.split(': ')[0][-6:] for p in skip.first] == ['line 2', 'line 3', 'line 4']


def test_csv_as_people_write_it(tmp_path):
    file = tmp_path/'x.csv'
    file.write_bytes('\ufeffimage, caption \n"a.jpg","one, ""two""\nthree"\n\nb.jpg\n"c.jpg",x\nd.jpg,y,z\ne.jpg,ü\n'.encode())
    skip = Problems('skip')
    rows = dict(csv_rows(file, skip, 'image', 'caption'))
    assert [(w[-6:], r['image'], r['caption']) for w, r in rows.items()] == [('line 2', 'a.jpg', 'one, "two"\nthree'), ('line 6', 'c.jpg', 'x'), ('line 8', 'e.jpg', 'ü')]
    assert skip.first == [f'{file}, line 5: has 1 fields for 2 columns', f'{file}, line 7: has 3 fields for 2 columns']
    assert "has no column 'label', only image, caption" in sentence(lambda: list(csv_rows(file, skip, 'label')))
    file.write_bytes(b'a,b\n1,\xff\n2,x\n')
    skip = Problems('skip')
    assert [r['a'] for _, r in csv_rows(file, skip)] == ['2'] and skip.first == [f'{file}, line 2: is not UTF-8 text']


def test_first_file(tmp_path):
    (tmp_path/'b.json').write_text('')
    (tmp_path/'a.json').mkdir()
    assert first_file(tmp_path, ['a.json', '*.json'], 'list') == tmp_path/'b.json'
    with pytest.raises(Absent, match='has no list: looked for c.json, d.json'): first_file(tmp_path, ['c.json', 'd.json'], 'list')
    assert 'is not a folder' in sentence(first_file, tmp_path/'b.json', ['*'], 'list')


# ---- batches ----

def test_equal_tensors_are_stacked_and_numbers_become_tensors():
    batch = collate([dict(image=torch.full((3, 2, 2), float(k)), label=k, score=k/2, right=k > 0, caption='x'*k, captions=['a']*k) for k in range(3)])
    assert learners is collate
    assert batch['image'].shape == (3, 3, 2, 2) and batch['label'].tolist() == [0, 1, 2] and batch['score'].tolist() == [0, .5, 1] and batch['right'].dtype == torch.bool
    assert batch['caption'] == ['', 'x', 'xx'] and batch['captions'] == [[], ['a'], ['a', 'a']] and not any(k.endswith('_mask') for k in batch)


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.sampled_from([(), (4,), (3, 2, 2)]), st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool]))
def test_ragged_sequences(lengths, rest, kind):
    "Behind each row zeros, and a mask (b n) that is True where a row was"
    rows = [torch.randint(0, 2, (n, *rest)).to(kind) for n in lengths]
    batch = collate([dict(x=row) for row in rows])
    assert batch['x'].dtype == kind and batch['x'].shape == (len(rows), max(lengths), *rest)
    if len(set(lengths)) == 1: assert list(batch) == ['x']; return
    assert batch['x_mask'].shape == (len(rows), max(lengths)) and batch['x_mask'].sum(1).tolist() == lengths
    for row, out, mask in zip(rows, batch['x'], batch['x_mask']):
        assert out[mask].equal(row) and not out[~mask].any() and mask.equal(torch.arange(max(lengths)) < len(row))


def test_ragged_pictures_have_a_mask_of_pixels():
    a, b = torch.ones(3, 2, 4), torch.ones(3, 3, 1)
    batch = collate([dict(image=a), dict(image=b)])
    assert batch['image'].shape == (2, 3, 3, 4) and batch['image_mask'].shape == (2, 3, 4)
    assert batch['image_mask'].sum((1, 2)).tolist() == [8, 3] and batch['image'].sum().item() == 24 + 9
    assert batch['image_mask'][0, :2, :4].all() and batch['image_mask'][1, :, 0].all()
    wide = collate([dict(image=torch.ones(3, 2, 2)), dict(image=torch.ones(3, 2, 3))])         # only the width differs: still rows and columns
    assert wide['image_mask'].shape == (2, 2, 3)
    both, mask = padded([torch.ones(2, 3, 2, 2), torch.ones(1, 3, 4, 4)])                       # clips of other length and size
    assert both.shape == mask.shape == (2, 2, 3, 4, 4) and mask.sum((1, 2, 3, 4)).tolist() == [24, 48]


def test_what_cannot_be_padded_stays_a_list():
    batch = collate([dict(x=torch.ones(2), y=None, z=1), dict(x=torch.ones(2, 2), y=3, z=None)])
    assert collate([dict(n=1), dict(n=10**30)])['n'] == [1, 10**30]
    assert [x.ndim for x in batch['x']] == [1, 2] and batch['y'] == [None, 3] and batch['z'] == [1, None]
    assert 'at least one sample' in sentence(collate, [])
    assert 'one sample has the fields a, another a, b' in sentence(collate, [dict(a=1), dict(a=1, b=2)])
    empty = collate([dict(boxes=torch.zeros(0, 4)), dict(boxes=torch.ones(2, 4))])
    assert empty['boxes_mask'].tolist() == [[False, False], [True, True]]


def test_a_loader_pads_what_single_samples_give():
    data = [dict(boxes=torch.ones(n, 4), caption=str(n)) for n in (1, 3, 2, 2)]
    first, second = BatchLoader(data, 2, workers=1)
    assert first['boxes_mask'].sum(1).tolist() == [1, 3] and 'boxes_mask' not in second


# ---- samples ----

def small(folder, n=4, **extra):
    for k in range(n): picture(folder, f'{k}.png', (20 + k, 10))
    return [dict(image=f'{k}.png', caption=f'number {k}', captions=[f'number {k}'], source=f'list.json, record {k}') | extra for k in range(n)]


def test_samples_and_batches_agree(tmp_path):
    data = Annotated(small(tmp_path), tmp_path, size=6)
    batch = data.batch([2, 0])
    assert batch['image'].shape == (2, 3, 6, 6) and batch['image'].dtype == torch.uint8 and batch['caption'] == ['number 2', 'number 0']
    assert batch['image'][0].equal(data[2]['image']) and data[-1]['caption'] == 'number 3' and len(data) == 4
    assert [s['caption'] for s in data] == [f'number {k}' for k in range(4)]                    # it ends where it ends
    assert data.texts([1]) == dict(caption=['number 1'], captions=[['number 1']], source=['list.json, record 1'])
    assert Annotated(small(tmp_path), tmp_path).batch([0, 1])['image_mask'].shape == (2, 10, 21)  # own sizes: padded
    means = Annotated(small(tmp_path), tmp_path, picture=lambda im: torch.tensor(np.array(im).mean((0, 1)))).batch([0, 1])
    assert means['image'].tolist() == [[200, 30, 40]]*2
    assert 'either size or picture' in sentence(Annotated, [], tmp_path, size=4, picture=len)


def test_bytes_and_pixels_and_pairs(tmp_path):
    small(tmp_path, 2)
    data = (tmp_path/'0.png').read_bytes()
    same = Annotated([dict(image=source) for source in ('0.png', data, Image.open(tmp_path/'0.png'), np.array(Image.open(tmp_path/'0.png')))], tmp_path, size=4)
    assert all(same[k]['image'].equal(same[0]['image']) for k in range(4))
    assert Annotated([dict(pair=['0.png', data], text='x', label=1)], tmp_path, size=4).batch([0])['pair'].shape == (1, 2, 3, 4, 4)
    clip = Annotated([dict(video='0.png', source='here')], tmp_path, video=lambda place, name: torch.zeros(len(name), 3, 2, 2))
    assert clip[0]['video'].shape == (5, 3, 2, 2)


def test_boxes_follow_the_size(tmp_path):
    records = small(tmp_path, 2, box=[2, 1, 12, 6], boxes=[], proposals=[[0., 0, 20, 10]])
    sample = Annotated(records, tmp_path, size=40)[0]
    assert sample['box'].tolist() == [4, 4, 24, 24] and sample['boxes'].shape == (0, 4) and sample['proposals'].tolist() == [[0, 0, 40, 40]]
    assert Annotated(records, tmp_path)[0]['box'].tolist() == [2, 1, 12, 6]
    assert Annotated(records, tmp_path, picture=lambda im: torch.zeros(1))[0]['box'].tolist() == [2, 1, 12, 6]


@pytest.mark.parametrize('box', [[5, 5, 5, 9], [5, 9, 9, 5], [20, 0, 30, 5], [-5, 0, 0, 5], [0, 10, 5, 20], [0, 0, float('nan'), 5], [0, 0, float('inf'), 5], [1, 2, 3], [[1, 2, 3]], 'abcd', None, [1, None, 3, 4], [[1, 2, 3, 4], [1]], [1, 10**400, 3, 4]])
def test_boxes_that_are_none(box): sentence(check_boxes, box, 20, 10)


@pytest.mark.parametrize('damage, words', [(lambda f: f.unlink(), '1.png does not exist'), (lambda f: f.write_bytes(b''), '1.png is empty'), (lambda f: f.write_bytes(b'GIF89a'), '1.png is not a JPEG'), (lambda f: f.write_bytes(f.read_bytes()[:50]), '1.png is ')])
def test_a_broken_picture_is_named_and_never_replaced(damage, words, tmp_path):
    records = small(tmp_path)
    damage(tmp_path/'1.png')
    data = Annotated(records, tmp_path, size=4)
    for found in (sentence(lambda: data[1]), sentence(data.batch, [0, 1])): assert found.startswith('list.json, record 1: ') and words in found
    skip = Annotated(records, tmp_path, size=4, problems=Problems('skip'))
    for _ in range(3): assert skip.batch([0, 1, 2])['caption'] == ['number 0', 'number 2']
    assert skip.problems.count == 1 and words in skip.problems.first[0] and skip.left_out() == ['list.json, record 1']
    assert 'all 1 records of a batch are broken' in sentence(skip.batch, [1])
    assert words in sentence(lambda: skip[1])                                                   # one sample cannot be left out


def test_what_workers_leave_out_is_known_outside(tmp_path):
    records = small(tmp_path, 8)
    for k in (2, 5): (tmp_path/f'{k}.png').unlink()
    data = Annotated(records, tmp_path, size=4, problems=Problems('skip'))
    seen = [c for batch in BatchLoader(data, 2, workers=2) for c in batch['caption']]
    assert seen == [f'number {k}' for k in (0, 1, 3, 4, 6, 7)]
    assert data.left_out() == ['list.json, record 2', 'list.json, record 5']


def test_records_never_lead_out_of_the_folder(tmp_path):
    picture(tmp_path, 'secret.png')
    (tmp_path/'data').mkdir()
    for path in ('../secret.png', str(tmp_path/'secret.png')):
        for field in (dict(image=path), dict(pair=[path, path]), dict(video=path)): assert 'only paths inside' in (s := sentence(lambda: Annotated([field], tmp_path/'data', size=4)[0])) or 'leads out' in s


# ---- formats ----

def toy(name='toy', task='caption', splits=('train', 'valid', 'all')):
    def read(folder, split, problems, *, loud=False):
        file = first_file(folder, [f'{split}.csv'], f'list for {split}')
        def make(row): yield dict(image=row['image'], caption=row['caption'].upper() if loud else row['caption'], captions=[row['caption'], 'another'])
        yield from annotations.checked(csv_rows(file, problems, 'image', 'caption'), problems, make)
    return Format(name, task, 'for the tests', read, splits)


def toy_folder(folder):
    for k in range(3): picture(folder, f'{k}.png', (20 + k, 10))
    (folder/'train.csv').write_text('image,caption\n0.png,a b\n1.png\n9.png,c\n2.png,c d e\n')
    (folder/'valid.csv').write_text('image,caption\n1.png,f\n')
    return folder


def test_read_dataset(tmp_path):
    data = read_dataset(toy_folder(tmp_path), toy(), on_error='skip', size=4)
    assert len(data) == 3 and data.problems.count == 1
    assert len(read_dataset(tmp_path, toy(), 'train+valid', on_error='skip')) == 4
    assert [r['caption'] for r in read_dataset(tmp_path, toy(), 'valid', each=True).records] == ['f', 'another']
    assert read_dataset(tmp_path, toy(), 'valid', loud=True)[0]['caption'] == 'F'
    assert 'train.csv, line 3: has 1 fields' in sentence(read_dataset, tmp_path, toy())
    assert "toy has no split 'test', only train, valid, all" in sentence(read_dataset, tmp_path, toy(), 'test')
    assert "format 'tout' is not one of coco, " in sentence(read_dataset, tmp_path, 'tout')
    assert 'is not a folder' in sentence(read_dataset, tmp_path/'x', toy())
    (tmp_path/'all.csv').write_text('image,caption\na\nb\n')
    assert "has no record in its split 'all': 2 are broken, the first: " in sentence(read_dataset, tmp_path, toy(), 'all', on_error='skip')


def test_check_dataset_counts_what_is_there(tmp_path):
    steps = []
    found = check_dataset(toy_folder(tmp_path), toy(), progress=lambda *a: steps.append(a))
    assert (found['records'], found['broken'], found['task'], list(found['splits'])) == (3, 2, 'caption', ['train', 'valid'])
    train = found['splits']['train']
    assert train['error'] is None and train['media'] | dict(bytes=0) == dict(files=2, bytes=0, width=[20, 21, 22], height=[10, 10, 10])
    assert train['media']['bytes'] == sum((tmp_path/f'{k}.png').stat().st_size for k in (0, 2))
    assert train['texts']['captions'] == dict(count=4, different=3, words=[1, 1.5, 3])
    assert [w.split(': ')[1] for w in train['first']] == ['has 1 fields for 2 columns', '9.png does not exist']
    assert steps == [('train', 1, 3), ('train', 2, 3), ('train', 3, 3), ('valid', 1, 1)]
    assert json.loads(json.dumps(found)) == found
    assert check_dataset(tmp_path, toy(), pictures=False)['splits']['train']['media']['files'] == 0
    (tmp_path/'train.csv').write_text('image,text\n')
    assert "has no column 'caption'" in check_dataset(tmp_path, toy())['splits']['train']['error']
    assert 'has no list for all' in sentence(check_dataset, tmp_path, toy(), ['all'])


def test_every_format_says_what_it_is():
    known = formats()
    assert {'coco', 'karpathy', 'flickr30k', 'conceptual_captions', 'sbu', 'visual_genome', 'simla', 'imagenet', 'csv'} <= set(known)
    for name, kind in known.items():
        assert kind.name == name and kind.task in FIELDS and kind.about and kind.splits and kind.media in annotations.MEDIA


def test_every_reader_refuses_an_empty_folder_in_one_sentence(tmp_path):
    for name, kind in formats().items():
        for split in kind.splits: sentence(read_dataset, tmp_path, name, split)
    assert 'fits no format' in sentence(detect_format, tmp_path)


def test_two_formats_fit(tmp_path):
    picture(tmp_path, 'a.png')
    (tmp_path/'train.csv').write_text('image,caption\na.png,x\n')
    assert detect_format(tmp_path) == 'csv'
    (tmp_path/'coco.json').write_text(json.dumps([dict(image='a.png', caption='x')]))
    assert 'fits simla, csv: say which format it is' in sentence(detect_format, tmp_path)


# ---- files stand in for the world ----

def coco_folder(folder, task, n):
    "The first samples of a task of the world, written as COCO publishes captions"
    batch = task.batch(list(range(n)))
    for k, image in enumerate(batch['image']):
        (folder/'train2017').mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder/'train2017'/f'{k:012d}.jpg', 'PNG')
    notes = [dict(id=100*k + j, image_id=k, caption=c) for k, said in enumerate(batch['captions']) for j, c in enumerate(said)]
    (folder/'annotations').mkdir()
    (folder/'annotations'/'captions_train2017.json').write_text(json.dumps(dict(images=[dict(id=k, file_name=f'{k:012d}.jpg') for k in range(n)], annotations=notes)))


class First:
    "The first samples of a data set"
    def __init__(self, data, n): self.data, self.n = data, n
    def __len__(self): return self.n
    def batch(self, indices): return self.data.batch(indices)


def test_one_learner_takes_the_world_or_a_folder(tmp_path):
    "The same call trains on generated pictures and on files, and, the pictures being the same, ends with the same numbers"
    from vl_tutor.models.backbones import GPTConfig, ViTConfig
    from vl_tutor.models.captioner import Captioner, CaptionerConfig, CrossConfig
    from vl_tutor.models.bridge import MapperConfig, ResamplerConfig
    from vl_tutor.training.objectives import captioning
    from vl_tutor.world.tasks import make_task, task_tokenizer
    words, task = task_tokenizer(), make_task('caption', 'one', 'train', image_size=32)
    coco_folder(tmp_path, task, 96)

    def objective(model, batch):
        ids, mask = words.encode(batch['caption'])
        return captioning(model, dict(video=batch['image'][:, None].float()/255, ids=ids, mask=mask))

    def train(data):
        torch.manual_seed(0)
        model = Captioner(CaptionerConfig(ViTConfig(32, 16, 16, 1, 2, 24), GPTConfig(words.vocab_size, 24, 16, 2, 2, 32, bos_id=1, eos_id=2),
                                          MapperConfig(hidden=12), ResamplerConfig(2, 2, 4, 3, 5, 1), CrossConfig(2, 4)))
        learn = make_learner(model, dict_loaders(data, data, bs=8, device='cpu'), objective, lr=1e-2)
        return quiet_fit(learn, 1), model.state_dict()

    world, files = First(task, 96), read_dataset(tmp_path, 'coco', size=32)
    for field in FIELDS['caption'].split(): assert type(world.batch([0, 1])[field]) is type(files.batch([0, 1])[field])
    (drawn, ours), (read, theirs) = train(world), train(files)
    assert drawn.equals(read) and all(ours[k].equal(theirs[k]) for k in ours)
    assert drawn['train_loss'].iloc[-1] < math.log(words.vocab_size)         # it has begun to learn


def test_records_module_is_offered_by_annotations():
    assert all(getattr(annotations, name) is getattr(records, name) for name in ('Problems', 'checked', 'first_file', 'entries', 'json_fields', 'numbered'))
