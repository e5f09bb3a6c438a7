"Shards: packed, interrupted, damaged, hostile; streamed in one order by any number of workers, shared by ranks, resumed anywhere."
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import pytest
import torch
from torch import nn
from PIL import Image
from vl_tutor.data.annotations import check_dataset, read_dataset
from vl_tutor.data.containers import OPENS, picture_bytes
from vl_tutor.data.shards import INDEX, ShardRows, Shards, pack
from vl_tutor.data.streams import StreamLoader, Walk, shard_loaders
from vl_tutor.training.learner import Checkpoints, dict_loaders, make_learner
from vl_tutor.world.tasks import TASKS, make_task

KINDS = list(OPENS)


def png(shade=0): return picture_bytes(Image.new('RGB', (12, 8), (shade, 0, 0)))


def records(n, bad=()): return [dict(image=b'no' if i in bad else png(i % 256), caption=f'number {i}', captions=[f'number {i}'], source=f'list, line {i + 1}') for i in range(n)]


def numbers(loader): return [[int(c.split()[1]) for c in batch['caption']] for batch in loader]


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('packed')/'shards'
    pack(records(230), folder, rows=50, chunk=8)
    return folder


# ---- pack ----

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', list(TASKS))
def test_every_task_of_the_world_comes_back(tmp_path, name, kind):
    task = make_task(name, size=14)
    pack(task, tmp_path/'s', kind=kind, rows=6, chunk=4)
    data = Shards(tmp_path/'s')
    assert len(data) == 14
    for i in (0, 7, 13):
        sample, truth = data[i], task[i]
        for field in task.fields:
            if isinstance(truth[field], torch.Tensor) and truth[field].ndim: assert torch.equal(torch.as_tensor(sample[field]), truth[field]), field
            else: assert sample[field] == truth[field], field


@pytest.mark.parametrize('kind', KINDS)
def test_packing_is_resumed_after_a_kill(tmp_path, kind):
    code = f"""
import sys, time
from vl_tutor.data.shards import pack
from vl_tutor.world.tasks import make_task
pack(make_task('caption', size=4000), {str(tmp_path/'killed')!r}, kind={kind!r}, rows=40, progress=lambda n: print(n, flush=True))
"""
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    for _ in range(3): process.stdout.readline()
    process.send_signal(signal.SIGKILL); process.wait()
    index = json.loads((tmp_path/'killed'/INDEX).read_text())
    assert 80 <= index['rows'] < 4000 and not index['complete']
    with pytest.raises(ValueError, match='packed half way'): ShardRows(tmp_path/'killed')
    half = len(index['shards'])
    task = make_task('caption', size=4000)
    before = {s['file']: (tmp_path/'killed'/s['file']).stat().st_mtime_ns for s in index['shards']}
    limit = dict(kind=kind, rows=40)
    def enough(n):
        if n >= (half + 2)*40: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): pack(task, tmp_path/'killed', progress=enough, **limit)
    again = json.loads((tmp_path/'killed'/INDEX).read_text())['shards']
    assert {f: (tmp_path/'killed'/f).stat().st_mtime_ns for f in before} == before                # what was whole is not written again
    with pytest.raises(KeyboardInterrupt): pack(task, tmp_path/'straight', progress=enough, **limit)
    assert again == json.loads((tmp_path/'straight'/INDEX).read_text())['shards']                 # the same bytes as without the kill


def test_broken_records_are_counted_or_stop_it(tmp_path):
    with pytest.raises(ValueError, match='list, line 3: .*not a JPEG'): pack(records(6, {2}), tmp_path/'a')
    index = pack(records(30, {2, 9, 29}), tmp_path/'b', rows=10, on_error='skip')
    assert (index['rows'], index['taken'], index['broken']) == (27, 30, 3) and index['first'][1].startswith('list, line 10: ')
    with pytest.raises(ValueError, match='no good record'): pack(records(3, {0, 1, 2}), tmp_path/'c', on_error='skip')


def test_broken_records_are_counted_once_when_resumed(tmp_path):
    def enough(n):
        if n > 15: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): pack(records(40, {2, 9, 29}), tmp_path/'b', rows=10, on_error='skip', progress=enough)
    index = pack(records(40, {2, 9, 29}), tmp_path/'b', rows=10, on_error='skip')
    assert (index['rows'], index['taken'], index['broken']) == (37, 40, 3)
    data = Shards(tmp_path/'b')
    assert [data.records[i]['caption'] for i in range(37)] == [f'number {i}' for i in range(40) if i not in (2, 9, 29)]


def test_a_folder_of_something_else_is_not_touched(tmp_path, packed):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds no shards'): pack(records(3), tmp_path)
    with pytest.raises(ValueError, match='their limits is'): pack(records(230), packed, rows=51, chunk=8)
    with pytest.raises(ValueError, match='their kind is'): pack(records(230), packed, rows=50, chunk=8, kind='tar')
    with pytest.raises(ValueError, match="no shards of kind 'zip'"): pack(records(3), tmp_path/'x', kind='zip')
    with pytest.raises(ValueError, match='all at least 1'): pack(records(3), tmp_path/'x', rows=0)
    with pytest.raises(ValueError, match='caption is not of one type'): pack([dict(caption='a'), dict(caption=1)], tmp_path/'y')


def test_a_data_set_of_files_keeps_their_bytes(tmp_path):
    (tmp_path/'train').mkdir()
    (tmp_path/'a.jpg').write_bytes(png(3))
    (tmp_path/'captions.csv').write_text('image,caption\na.jpg,dark red\n')
    data = read_dataset(tmp_path, 'csv', size=8)
    pack(data, tmp_path/'train'/'shards')
    assert bytes(ShardRows(tmp_path/'train'/'shards')[0]['image']) == png(3)


def test_shards_end_at_so_many_bytes(tmp_path):
    index = pack(records(20), tmp_path/'s', size=len(png())*4)
    assert max(s['rows'] for s in index['shards']) == 4


# ---- read ----

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('harm,says', [(lambda f: f.unlink(), 'is missing'), (lambda f: f.write_bytes(f.read_bytes()[:-7]), 'bytes, not'), (lambda f: f.write_bytes(b''), 'has 0 bytes')])
def test_a_lost_shard_is_said_or_counted(tmp_path, kind, harm, says):
    pack(records(30), tmp_path/'s', rows=10, kind=kind)
    harm(tmp_path/'s'/f'part-00001.{kind}')
    with pytest.raises(ValueError, match=f'part-00001.{kind}.*{says}.*10 rows are lost'): Shards(tmp_path/'s')
    data = Shards(tmp_path/'s', size=8, on_error='skip')
    assert (len(data), data.problems.count, data.records.lost) == (20, 1, 10)
    assert sum(map(len, numbers(StreamLoader(data, 7, shuffle=False)))) == 20
    found = check_dataset(tmp_path/'s', 'shards')
    assert found['broken'] == 1 and found['records'] == 20


@pytest.mark.parametrize('kind', KINDS)
def test_flipped_bytes_never_crash(tmp_path, kind):
    pack(records(12), tmp_path/'s', rows=12, kind=kind)
    file, dice = tmp_path/'s'/f'part-00000.{kind}', torch.Generator().manual_seed(0)
    data = file.read_bytes()
    for _ in range(120):
        broken = bytearray(data)
        for place in torch.randint(len(data), (3,), generator=dice).tolist(): broken[place] ^= 255
        file.write_bytes(broken)
        with pytest.raises(ValueError, match='not what was packed'): ShardRows(tmp_path/'s', verify=True)
        for i in (0, 11):
            try: Shards(tmp_path/'s', size=8)[i]
            except ValueError as error: assert '\n' not in str(error) and len(str(error)) < 500


def test_a_damaged_picture_in_a_batch_is_left_out(tmp_path):
    pack(records(8), tmp_path/'s', kind='tar')
    file = tmp_path/'s'/'part-00000.tar'
    data = bytearray(file.read_bytes())
    place = data.find(b'\x89PNG')
    data[place:place + 4] = b'XXXX'
    file.write_bytes(data)
    with pytest.raises(ValueError, match='part-00000.tar, row 0: .*not a JPEG'): Shards(tmp_path/'s', size=8).batch([0, 1])
    data = Shards(tmp_path/'s', size=8, on_error='skip')
    assert data.batch([0, 1])['caption'] == ['number 1'] and data.left_out() == ['part-00000.tar, row 0']


def tar_of(path, *members):
    with tarfile.open(path, 'w') as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None: info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            else: info.size = len(data)
            out.addfile(info, io.BytesIO(data or b''))


def test_a_tar_of_webdataset(tmp_path):
    tar_of(tmp_path/'web.tar', ('x/1.jpg', png(1)), ('x/1.txt', b'one\n'), ('x/1.cls', b'4'), ('y/1.png', png(2)), ('y/1.json', b'{"caption": "two", "image": "/etc/passwd"}'))
    data = Shards(tmp_path, size=8)
    assert len(data) == 2
    assert (data[0]['caption'], data[0]['label'], int(data[0]['image'][0, 0, 0])) == ('one', 4, 1)
    assert data[1]['caption'] == 'two' and int(data[1]['image'][0, 0, 0]) == 2              # the path in the JSON is not followed


class Ran(Exception): pass


def run_me(): raise Ran


@pytest.mark.parametrize('end', ['pyd', 'pickle', 'pkl', 'pth', 'npy', 'exe', 'png.pyd', 'PKL'])
def test_nothing_in_a_tar_is_run(tmp_path, end):
    attack = b'ctest_shards\nrun_me\n(tR.'                                                 # a pickle that calls run_me
    import pickle
    with pytest.raises(Exception): pickle.loads(attack)
    tar_of(tmp_path/'web.tar', ('1.png', png()), (f'1.{end}', attack))
    with pytest.raises(ValueError, match='only pictures, json, txt and cls are read'): Shards(tmp_path)[0]


@pytest.mark.parametrize('members,says', [
    ([('1.png', png()), ('1.json', b'[1]')], 'holds a list'), ([('1.png', png()), ('1.json', b'{')], 'is not JSON'), ([('1.txt', b'\xff')], 'not UTF-8'),
    ([('1.json', b'['*100_000)], 'is not JSON'), ([('1.png', None)], 'no file'), ([], 'cut off or empty')])
def test_a_hostile_tar_gets_one_sentence(tmp_path, members, says):
    tar_of(tmp_path/'web.tar', *members)
    with pytest.raises(ValueError, match=says) as e: Shards(tmp_path)[0]
    assert '\n' not in str(e.value)


def test_other_libraries_read_ours_and_we_read_theirs(tmp_path):
    import datasets
    import webdataset
    for kind in KINDS: pack(records(20), tmp_path/kind, rows=20, kind=kind)
    theirs = list(webdataset.WebDataset(str(tmp_path/'tar'/'part-00000.tar'), shardshuffle=False))
    assert [t['png'] for t in theirs] == [png(i) for i in range(20)] and json.loads(theirs[5]['json'])['caption'] == 'number 5'
    found = datasets.Dataset.from_parquet(str(tmp_path/'parquet'/'part-00000.parquet'), cache_dir=str(tmp_path/'cache'))
    assert found['caption'][3] == 'number 3' and found['image'][3] == png(3)
    hugging = datasets.Dataset.from_list([dict(image=dict(bytes=png(i), path=None), caption=f'number {i}') for i in range(6)])
    hugging.cast_column('image', datasets.Image()).save_to_disk(str(tmp_path/'hub'))
    data = Shards(tmp_path/'hub', size=8)
    assert [int(data[i]['image'][0, 0, 0]) for i in range(6)] == list(range(6))
    with webdataset.TarWriter(str(tmp_path/'wds.tar')) as sink:
        for i in range(3): sink.write({'__key__': f's{i}', 'png': Image.new('RGB', (4, 4), (i, 0, 0)), 'json': dict(caption=f'number {i}')})
    (tmp_path/'wds').mkdir(); (tmp_path/'wds.tar').rename(tmp_path/'wds'/'a.tar')
    assert [Shards(tmp_path/'wds', size=4)[i]['caption'] for i in range(3)] == ['number 0', 'number 1', 'number 2']


def test_splits_lie_in_folders(tmp_path):
    for split in ('train', 'valid'): pack(records(4), tmp_path/split)
    found = check_dataset(tmp_path, 'shards')
    assert set(found['splits']) == {'train', 'valid'} and found['records'] == 8
    assert read_dataset(tmp_path, 'shards', 'valid', size=8).batch([3])['caption'] == ['number 3']


@pytest.mark.parametrize('name', ['clip_caption', 'statement_pair', 'referring'])
def test_packed_tasks_are_checked_and_read_as_a_format(tmp_path, name):
    task = make_task(name, size=5)
    pack(task, tmp_path/'s')
    found = check_dataset(tmp_path/'s', 'shards')
    assert (found['records'], found['broken']) == (5, 0) and found['splits']['all']['media']['bytes'] > 500
    batch, truth = read_dataset(tmp_path/'s', 'shards', 'all').batch([4, 1]), task.batch([4, 1])
    for field in {'image', 'pair', 'video', 'box', 'caption', 'text'} & set(task.fields):
        assert torch.equal(batch[field], truth[field]) if isinstance(truth[field], torch.Tensor) else batch[field] == truth[field]


def test_a_video_file_is_packed_as_it_is(tmp_path):
    from video_files import solid, write_video
    write_video(tmp_path/'a.mp4', solid(range(0, 90, 10), 32, 24), codec='mpeg4')
    for kind in ('arrow', 'parquet'):
        pack([dict(video='a.mp4', caption='grey')], tmp_path/kind, kind=kind, root=tmp_path)
        assert Shards(tmp_path/kind, size=16)[0]['video'].shape == (8, 3, 16, 16)
        assert check_dataset(tmp_path/kind, 'shards')['broken'] == 0
    with pytest.raises(ValueError, match='a tar holds pictures, not video files'): pack([dict(video='a.mp4')], tmp_path/'tar', kind='tar', root=tmp_path)


def test_an_index_cannot_lead_out(tmp_path):
    pack(records(4), tmp_path/'s')
    index = json.loads((tmp_path/'s'/INDEX).read_text())
    index['shards'][0]['file'] = '../s/part-00000.arrow'
    (tmp_path/'s'/INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match='leads out'): Shards(tmp_path/'s')
    (tmp_path/'s'/INDEX).write_text('{"shards": 3}')
    with pytest.raises(ValueError, match='index.json'): Shards(tmp_path/'s')


# ---- the order ----

def walk_ref(chunks, throws, buffer):
    "The buffer spelled out: rows in order, and a die"
    rows = [i for i in range(sum(chunks))]
    held, out = rows[:buffer], []
    rest = rows[buffer:]
    for t in throws:
        j = t % len(held)
        held[j], held[-1] = held[-1], held[j]
        out.append(held.pop())
        if rest: held.append(rest.pop(0))
    return out


@pytest.mark.parametrize('buffer', [1, 7, 50, 1000])
def test_the_walk_is_what_it_says(buffer):
    walk = Walk([40], seed=3, buffer=buffer)
    throws = [walk.dice('pick', n, 1)[0] for n in range(40)]
    assert list(walk) == walk_ref([40], throws, buffer)


@pytest.mark.parametrize('ranks', [1, 2, 3, 7])
@pytest.mark.parametrize('shuffle', [True, False])
def test_ranks_share_without_overlap_or_loss(ranks, shuffle):
    for epoch in (0, 1):
        parts = [list(Walk([5, 9, 1, 30, 22], rank=r, ranks=ranks, buffer=11, shuffle=shuffle).begin(epoch)) for r in range(ranks)]
        assert sorted(sum(parts, [])) == list(range(67)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_walk_goes_on_from_anywhere():
    straight = list(Walk([8]*20, buffer=30).begin(2))
    for stop in range(161):
        walk, other = Walk([8]*20, buffer=30).begin(2), Walk([8]*20, buffer=30)
        for _ in range(stop): next(walk)
        other.load_state_dict(json.loads(json.dumps(walk.state_dict())))
        assert list(other) == straight[stop:]


def test_epochs_seeds_and_buffers_differ():
    base = list(Walk([8]*20))
    assert base == list(Walk([8]*20)) != list(Walk([8]*20, seed=1)) and base != list(Walk([8]*20).begin(1))
    for other in (dict(seed=1), dict(buffer=9), dict(rank=1, ranks=2), dict(shuffle=False)):
        with pytest.raises(ValueError, match='belongs to other shards'): Walk([8]*20, **other).load_state_dict(Walk([8]*20).state_dict())
    for wrong in (dict(rank=2, ranks=2), dict(buffer=0)):
        with pytest.raises(ValueError): Walk([8], **wrong)


# ---- streams ----

@pytest.mark.parametrize('workers', [0, 1, 2, 4])
def test_resume_is_exact_with_any_number_of_workers(packed, workers):
    data = Shards(packed, size=8)
    whole = StreamLoader(data, 16, buffer=64, seed=5)
    epochs = [numbers(whole), numbers(whole)]
    assert [len(e) for e in epochs] == [14, 14] == [len(whole)]*2 and epochs[0] != epochs[1] and len({n for b in epochs[0] for n in b}) == 224
    for stop in (0, 5, 13, 14):
        stream = StreamLoader(data, 16, buffer=64, seed=5, workers=workers)
        running = iter(stream)
        first = [next(running) for _ in range(stop)]
        if stop == 14: assert next(running, None) is None
        state = json.loads(json.dumps(stream.state_dict()))
        assert numbers(first) == epochs[0][:stop]
        other = StreamLoader(data, 16, buffer=64, seed=5, workers=2 - workers//2)
        other.load_state_dict(state)
        assert numbers(other) == (epochs[0][stop:] if stop < 14 else epochs[1])
        if stop < 14: assert numbers(other) == epochs[1]


def test_randomness_of_a_batch_is_its_own(packed):
    data = Shards(packed, picture=lambda image: torch.rand(2))
    runs = [torch.cat([b['image'] for b in StreamLoader(data, 16, workers=w, seed=1)]) for w in (0, 2)]
    assert torch.equal(*runs)
    stream, again = StreamLoader(data, 16, seed=1), StreamLoader(data, 16, seed=1)
    running = iter(stream)
    [next(running) for _ in range(4)]
    again.load_state_dict(stream.state_dict())
    assert torch.equal(torch.cat([b['image'] for b in again]), runs[0][64:])


def test_streams_of_ranks_are_equally_long(packed):
    data = Shards(packed, size=8)
    streams = [StreamLoader(data, 10, rank=r, ranks=3) for r in range(3)]
    found = [numbers(s) for s in streams]
    assert [len(f) for f in found] == [len(s) for s in streams] == [7]*3
    rows = [n for f in found for b in f for n in b]
    assert len(rows) == len(set(rows)) == 210


def test_unshuffled_streams_are_complete_and_the_same_each_time(packed):
    stream = StreamLoader(Shards(packed, size=8), 64, shuffle=False)
    assert numbers(stream) == numbers(stream) == [list(range(k, min(k + 64, 230))) for k in range(0, 230, 64)]
    assert numbers([stream.peek()]) == [list(range(64))]


def test_a_state_of_other_shards_is_refused(tmp_path, packed):
    pack(records(40), tmp_path/'s')
    with pytest.raises(ValueError, match='belongs to other shards'):
        StreamLoader(Shards(tmp_path/'s'), 4).load_state_dict(StreamLoader(Shards(packed), 4).state_dict())
    with pytest.raises(ValueError, match='at least one sample'): StreamLoader(Shards(packed), 0)


class Mean(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Linear(3*64, 1)
    def forward(self, batch): return self.w(batch['image'].float().flatten(1)/255)[:, 0]


def objective(model, batch):
    truth = torch.tensor([int(c.split()[1])/230 for c in batch['caption']])
    return dict(square=(model(batch) - truth).square().mean())


class Stop(Exception): pass


@pytest.mark.parametrize('workers', [0, 2])
def test_a_learner_trains_on_a_stream_and_resumes_bit_for_bit(tmp_path, packed, workers):
    from fastai.callback.core import Callback
    class Halt(Callback):
        order = 99
        def after_batch(self):
            if self.learn.training and self.learn.steps == 17: raise Stop('here')
    def learner(folder, *more):
        torch.manual_seed(0)
        data = Shards(packed, size=8)
        return make_learner(Mean(), shard_loaders(data, data, bs=16, buffer=40, seed=4, workers=workers, device='cpu'), objective,
                            cbs=[Checkpoints(folder, every=5), *more])
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
    straight, halted, resumed = learner(tmp_path/'a'), learner(tmp_path/'b', Halt()), learner(tmp_path/'b')
    fit(straight)
    with pytest.raises(Stop): fit(halted)
    fit(resumed)
    assert resumed.steps == straight.steps == 28
    for a, b in zip(straight.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


def test_dict_loaders_take_shards_too(packed):
    loaders = dict_loaders(Shards(packed, size=8), Shards(packed, size=8), bs=32)
    assert len(list(loaders.train)) == 7 and sum(map(len, numbers(loaders.valid))) == 230


# ---- memory ----

MEASURE = """
import re, sys, torch
from vl_tutor.data.shards import Shards
from vl_tutor.data.streams import StreamLoader
torch.set_num_threads(1)
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1000
data = Shards(sys.argv[1], size=32)
before = peak()
for batch in StreamLoader(data, 32, buffer=500): pass
print(before, peak())
"""


@pytest.mark.parametrize('kind', KINDS)
def test_memory_does_not_grow_with_the_data(tmp_path, kind):
    grown, out = [], io.BytesIO()
    Image.new('RGB', (128, 128)).save(out, 'BMP')
    head = out.getvalue()[:54]
    for mb in (70, 140):
        noisy = (dict(image=head + os.urandom(128*128*3), caption='noise') for _ in range(mb*20))
        pack(noisy, tmp_path/f'{mb}', kind=kind, size=16_000_000)
        told = subprocess.run([sys.executable, '-W', 'ignore', '-c', MEASURE, tmp_path/f'{mb}'], capture_output=True, text=True, check=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        before, after = map(float, told.stdout.split())
        grown.append(after - before)
        assert after < 1000
    assert grown[1] - grown[0] < 25, grown                                                  # MB, for 70 MB more data
