"vl-tutor data: each command as a user gives it, and what it says to wrong requests."
import json
import pytest
import torch
from PIL import Image
from vl_tutor.data.annotations import formats
from vl_tutor.data.shards import Shards
from vl_tutor.world.tasks import make_task


@pytest.fixture
def folder(tmp_path):
    "Three pictures and their captions; one was cut off, one was never sent"
    place = tmp_path/'mine'
    place.mkdir()
    for n in range(2): Image.new('RGB', (48, 32), (90*n, 0, 0)).save(place/f'{n}.png')
    (place/'1.png').write_bytes((place/'1.png').read_bytes()[:60])
    (place/'captions.csv').write_text('image,caption\n0.png,all dark\n1.png,cut off\n2.png,never sent\n')
    return place


@pytest.fixture
def whole(folder):
    (folder/'captions.csv').write_text('image,caption\n0.png,all dark\n')
    (folder/'1.png').unlink()
    return folder


def one_sentence(done, code):
    assert done.code == code and not done.out, done
    assert done.err.startswith('vl-tutor: ') and done.err.count('\n') == 1 and 'Traceback' not in done.err, done.err
    return done.err


def test_help(run):
    for command in ([], ['check'], ['pack'], ['formats']):
        done = run('data', *command, '--help')
        assert done.code == 0 and 'Usage' in done.out
    assert 'data' in run('--help').out


def test_formats(run):
    plain, machine = run('data', 'formats'), run('data', 'formats', '--json')
    assert plain.code == machine.code == 0
    assert [r['name'] for r in json.loads(machine.out)] == list(formats()) == [line.split()[0] for line in plain.out.splitlines()]


def test_check_clean(run, whole):
    done = run('data', 'check', whole, '--format', 'csv')
    assert done.code == 0 and '1 records, 0 broken' in done.out and 'width: 48 to 48 pixels' in done.out, done
    assert run('data', 'check', whole, '--format', 'csv', '--split', 'train').code == 0


def test_check_broken(run, folder):
    done = run('data', 'check', folder, '--format', 'csv')
    assert done.code == 1 and '1 records, 2 broken' in done.out and 'captions.csv, line 3' in done.out and '2.png' in done.out, done
    machine = run('data', 'check', folder, '--format', 'csv', '--json')
    found = json.loads(machine.out)
    assert machine.code == 1 and (found['records'], found['broken'], found['format']) == (1, 2, 'csv')
    assert 'captions.csv, line' in one_sentence(run('data', 'check', folder, '--format', 'csv', '--on-error', 'raise'), 1)


def test_check_without_pictures(run, folder):
    done = run('data', 'check', folder, '--format', 'csv', '--no-pictures', '--json')
    assert json.loads(done.out)['broken'] <= 1


def test_check_guesses_the_format(run, whole):
    done = run('data', 'check', whole, '--json')
    assert done.code == 0 and json.loads(done.out)['format'] == 'csv', done


@pytest.mark.parametrize('args,says', [
    (['--format', 'nonsense'], "format 'nonsense' is not one of"), (['--format', 'csv', '--split', 'holdout'], '--split holdout'),
    (['--format', 'csv', '--on-error', 'stop'], '--on-error stop'), (['--format', 'coco'], 'has no'), (['--nonsense'], 'No such option'),
    (['--format', 'shards'], '')])
def test_check_wrong_requests(run, whole, args, says):
    assert says in one_sentence(run('data', 'check', whole, *args), 2)


def test_check_of_nothing(run, tmp_path):
    assert 'nowhere does not exist' in one_sentence(run('data', 'check', tmp_path/'nowhere', '--format', 'csv'), 2)
    (tmp_path/'file').write_text('x')
    assert 'is a file' in one_sentence(run('data', 'check', tmp_path/'file', '--format', 'csv'), 2)
    one_sentence(run('data', 'check', tmp_path), 2)
    one_sentence(run('data', 'check'), 2)


def test_pack_a_folder(run, folder, tmp_path):
    assert 'captions.csv, line' in one_sentence(run('data', 'pack', folder, tmp_path/'a', '--format', 'csv'), 1)
    done = run('data', 'pack', folder, tmp_path/'b', '--format', 'csv', '--on-error', 'skip', '--json')
    said = json.loads(done.out)
    assert done.code == 1 and (said['rows'], said['shards'], said['broken']) == (1, 1, 2), done
    assert run('data', 'check', tmp_path/'b', '--format', 'shards').code == 0
    assert Shards(tmp_path/'b', size=8)[0]['caption'] == 'all dark'


@pytest.mark.parametrize('kind', ['arrow', 'parquet', 'tar'])
def test_pack_the_world(run, tmp_path, kind):
    done = run('data', 'pack', 'world', tmp_path/'w', '--task', 'question', '--level', 'few', '--count', 70, '--rows', 30, '--kind', kind, '--image-size', 32)
    assert done.code == 0 and '70 rows in 3 shards' in done.out, done
    data, task = Shards(tmp_path/'w'), make_task('question', 'few', image_size=32)
    assert torch.equal(data[69]['image'], task[69]['image']) and data[69]['question'] == task[69]['question']
    again = run('data', 'pack', 'world', tmp_path/'w', '--task', 'question', '--level', 'few', '--count', 70, '--rows', 30, '--kind', kind, '--image-size', 32)
    assert again.code == 0 and again.out == done.out
    damaged = tmp_path/'w'/f'part-00001.{kind}'
    damaged.write_bytes(damaged.read_bytes()[:-5])
    found = run('data', 'check', tmp_path/'w', '--format', 'shards')
    assert found.code == 1 and f'part-00001.{kind}' in found.out and '30 rows are lost' in found.out


@pytest.mark.parametrize('args,says', [
    (['--task', 'poem'], "no task 'poem'"), (['--kind', 'zip'], "no shards of kind 'zip'"), (['--rows', 0], 'all at least 1'), (['--count', -1], '--count -1'),
    (['--level', 'many'], 'many'), (['--split', 'holdout'], 'holdout'), (['--image-size', 2], '--image-size 2'), (['--on-error', 'x'], '--on-error x')])
def test_pack_wrong_requests(run, tmp_path, args, says):
    assert says in one_sentence(run('data', 'pack', 'world', tmp_path/'w', '--count', 5, *args), 2)
    assert not (tmp_path/'w').exists()


def test_pack_overwrites_nothing(run, whole, tmp_path):
    (tmp_path/'w').mkdir()
    (tmp_path/'w'/'thesis.txt').write_text('mine')
    assert 'holds no shards' in one_sentence(run('data', 'pack', 'world', tmp_path/'w', '--count', 5), 2)
    assert run('data', 'pack', 'world', tmp_path/'v', '--count', 5).code == 0
    assert 'holds other shards' in one_sentence(run('data', 'pack', 'world', tmp_path/'v', '--count', 6), 2)
    assert 'holds other shards' in one_sentence(run('data', 'pack', whole, tmp_path/'v', '--format', 'csv'), 2)
