"Folders of classes and spreadsheets: ImageNet in each of its layouts, and the CSV that somebody has."
import json
import os
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from vl_tutor.data.annotations import check_dataset, detect_format, read_dataset
from vl_tutor.data.folders import drawn_split


def picture(folder, path, size=(12, 8)):
    place = folder/path
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 120, 30)).save(place, 'PNG')


def write(folder, path, content):
    place = folder/path
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes): place.write_bytes(content)
    else: place.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


def said(data, *fields): return [tuple(r[f] for f in fields) for r in data.records]


# ---- ImageNet ----

FISH, SHARK = 'n01440764', 'n01484850'


def folders(root, train='train', val='val', n=2):
    for split, count in ((train, n), (val, 1)):
        for wnid in (SHARK, FISH):
            for k in range(count): picture(root, f'{split}/{wnid}/{wnid}_{k:02d}.JPEG')


def test_folder_for_each_class(tmp_path):
    folders(tmp_path)
    write(tmp_path, f'train/{FISH}/notes.txt', 'no picture')
    data = read_dataset(tmp_path, 'imagenet', size=8)
    assert said(data, 'label', 'class_name') == [(0, FISH)]*2 + [(1, SHARK)]*2                # by alphabet
    assert data[0]['image'].shape == (3, 8, 8) and set(data.batch([0, 3])['label'].tolist()) == {0, 1}
    assert said(read_dataset(tmp_path, 'imagenet', 'valid'), 'label') == [(0,), (1,)]
    assert detect_format(tmp_path) == 'imagenet'
    found = check_dataset(tmp_path, 'imagenet')
    assert {k: v['records'] for k, v in found['splits'].items()} == dict(train=4, valid=2)


def test_names_of_classes(tmp_path):
    folders(tmp_path)
    write(tmp_path, 'LOC_synset_mapping.txt', f'{FISH} tench, Tinca tinca\n{SHARK} great white shark, white shark\n')
    assert said(read_dataset(tmp_path, 'imagenet'), 'class_name')[::2] == [('tench',), ('great white shark',)]
    (tmp_path/'LOC_synset_mapping.txt').unlink()
    write(tmp_path, 'imagenet_class_index.json', {'0': [FISH, 'tench'], '1': [SHARK, 'great_white_shark']})
    assert said(read_dataset(tmp_path, 'imagenet'), 'class_name')[::2] == [('tench',), ('great white shark',)]
    write(tmp_path, 'imagenet_class_index.json', {'0': [FISH, 5]})
    with pytest.raises(ValueError, match='imagenet_class_index.json: a class'): read_dataset(tmp_path, 'imagenet')


def test_validation_classes_are_numbered_as_in_training(tmp_path):
    folders(tmp_path)
    for file in (tmp_path/'val'/FISH).iterdir(): file.unlink()
    (tmp_path/'val'/FISH).rmdir()
    assert said(read_dataset(tmp_path, 'imagenet', 'valid'), 'label') == [(1,)]
    picture(tmp_path, 'val/n09999999/n09999999_1.JPEG')
    with pytest.raises(ValueError, match='n09999999 is none of the 2 classes'): read_dataset(tmp_path, 'imagenet', 'valid')


def test_lines_of_path_and_label(tmp_path):
    folders(tmp_path)
    picture(tmp_path, 'val/ILSVRC2012_val_00000001.JPEG')
    write(tmp_path, 'meta/train.txt', f'{FISH}/{FISH}_00.JPEG 0\n{SHARK}/{SHARK}_01.JPEG 1\n')
    write(tmp_path, 'meta/val.txt', 'ILSVRC2012_val_00000001.JPEG 65\n')
    assert said(read_dataset(tmp_path, 'imagenet'), 'image', 'label', 'class_name') == [(f'train/{FISH}/{FISH}_00.JPEG', 0, FISH), (f'train/{SHARK}/{SHARK}_01.JPEG', 1, SHARK)]
    assert said(read_dataset(tmp_path, 'imagenet', 'valid'), 'label', 'class_name') == [(65, '65')]


def test_lines_of_imagenet_22k(tmp_path):
    picture(tmp_path, f'images/{FISH}/{FISH}_18.JPEG')
    write(tmp_path, 'train.txt', f'{FISH} 18 7\n')
    assert said(read_dataset(tmp_path, 'imagenet'), 'image', 'label') == [(f'images/{FISH}/{FISH}_18.JPEG', 7)]


@pytest.mark.parametrize('line, words', [('one.JPEG', 'number of a class'), ('one.JPEG x', 'number of a class'), ('one.JPEG 1 2', 'number of a class'), ('gone.JPEG 1', 'is not there'),
                                         ('/etc/passwd 1', 'absolute'), ('../x.JPEG 1', 'leads out'), (f'train/{FISH}/{FISH}_00.JPEG 0', 'occurs twice')])
def test_broken_label_lines(line, words, tmp_path):
    folders(tmp_path)
    write(tmp_path, 'meta/train.txt', f'train/{FISH}/{FISH}_00.JPEG 0\n\n{line}\n')
    with pytest.raises(ValueError, match=f'train.txt, line 3: .*{words}'): read_dataset(tmp_path, 'imagenet')
    data = read_dataset(tmp_path, 'imagenet', on_error='skip')
    assert len(data) == 1 and data.problems.count == 1


def test_twenty_one_thousand_classes_share_their_folders(tmp_path):
    for wnid, root in ((FISH, 'imagenet21k_train'), (SHARK, 'imagenet21k_small_classes')):
        for k in range(13): picture(tmp_path, f'{root}/{wnid}/{wnid}_{k:02d}.JPEG')
    write(tmp_path, 'classes.json', {FISH: 11, SHARK: 4})
    train, valid = (read_dataset(tmp_path, 'imagenet', split) for split in ('train', 'valid'))
    assert len(train) == 6 and len(valid) == 20
    assert said(train, 'label') == [(11,)]*3 + [(4,)]*3
    assert valid.records[0]['image'].endswith('_03.JPEG') and not {r['image'] for r in train.records} & {r['image'] for r in valid.records}
    assert len(read_dataset(tmp_path, 'imagenet', 'valid', last=2)) == 4
    write(tmp_path, 'classes.json', {FISH: '11'})
    with pytest.raises(ValueError, match=f"classes.json: the number of '{FISH}' is '11'"): read_dataset(tmp_path, 'imagenet')
    write(tmp_path, 'classes.json', {FISH: 11})
    with pytest.raises(ValueError, match=f'{SHARK} is none of the 1 classes'): read_dataset(tmp_path, 'imagenet')


def test_class_folder_that_leads_out(tmp_path):
    folders(tmp_path/'data')
    picture(tmp_path, 'outside/secret.JPEG')
    os.symlink(tmp_path/'outside', tmp_path/'data'/'train'/'n02000000')
    with pytest.raises(ValueError, match='leads out of .* by a link'): read_dataset(tmp_path/'data', 'imagenet')
    assert len(read_dataset(tmp_path/'data', 'imagenet', on_error='skip')) == 4


def test_no_classes(tmp_path):
    (tmp_path/'train').mkdir()
    with pytest.raises(ValueError, match='has no folders of classes for train: looked in train'): read_dataset(tmp_path, 'imagenet')
    with pytest.raises(ValueError, match="imagenet has no split 'all'"): read_dataset(tmp_path, 'imagenet', 'all')


# ---- CSV ----

def test_one_csv_is_split_by_name(tmp_path):
    for k in range(60): picture(tmp_path, f'images/{k}.jpg', (4, 4))
    write(tmp_path, 'captions.csv', 'image,caption\n' + ''.join(f'{k}.jpg,"number {k}, a green sheet"\n{k}.jpg,again {k}\n' for k in range(60)))
    parts = {split: {r['image'] for r in read_dataset(tmp_path, 'csv', split).records} for split in ('train', 'valid', 'test', 'all')}
    assert parts['train'] | parts['valid'] | parts['test'] == parts['all'] and sum(map(len, parts.values())) == 120
    assert len(parts['train']) > 40 and parts['valid'] and parts['test']
    data = read_dataset(tmp_path, 'csv', 'all')
    assert data[7]['captions'] == ['number 7, a green sheet', 'again 7'] and data[7]['source'].endswith('captions.csv, line 16')
    assert len(read_dataset(tmp_path, 'csv', 'all', each=True)) == 120
    assert drawn_split('0.jpg') == 'train' and drawn_split('6.jpg') == drawn_split('6.jpg')
    assert check_dataset(tmp_path, 'csv')['records'] == 60 and detect_format(tmp_path) == 'csv'


@pytest.mark.parametrize('head, fields', [('file_name,text', '{0},a sheet'), ('Title;Path', 'a sheet;{0}'), ('"File Name"\tLABEL', '{0}\tgreen'), ('filename|class|description', '{0}|green|a sheet'),
                                          ('id,img_path,Category', '5,{0},green'), ('\ufeffimage,caption', '{0},a sheet')])
def test_columns_are_guessed(head, fields, tmp_path):
    picture(tmp_path, 'a.png')
    write(tmp_path, 'my.tsv' if '\t' in head else 'my.csv', f'{head}\r\n{fields.format("a.png")}\r\n')
    record, = read_dataset(tmp_path, 'csv', 'all').records
    assert record['image'] == 'a.png'
    assert record.get('caption', 'a sheet') == 'a sheet' and record.get('class_name', 'green') == 'green' and ('caption' in record or 'label' in record)


def test_columns_are_given(tmp_path):
    picture(tmp_path, 'pics/a.png')
    write(tmp_path, 'one.csv', 'a,b,c\npics/a,green,a sheet\n')
    write(tmp_path, 'two.csv', 'x\n1\n')
    with pytest.raises(ValueError, match='has 2 lists, one.csv, two.csv: say which file'): read_dataset(tmp_path, 'csv', 'all')
    with pytest.raises(ValueError, match='one.csv, line 1: which of a, b, c is the picture'): read_dataset(tmp_path, 'csv', 'all', file='one.csv')
    with pytest.raises(ValueError, match='which of a, b, c is the caption'): read_dataset(tmp_path, 'csv', 'all', file='one.csv', image_column='a')
    with pytest.raises(ValueError, match="there is no column 'd'"): read_dataset(tmp_path, 'csv', 'all', file='one.csv', image_column='d')
    record, = read_dataset(tmp_path, 'csv', 'all', file='one.csv', image_column='a', caption_column='c', label_column='b').records
    assert (record['image'], record['caption'], record['class_name'], record['label']) == ('pics/a.png', 'a sheet', 'green', 0)


def test_a_file_for_each_split(tmp_path):
    for k in range(3): picture(tmp_path, f'{k}.png')
    write(tmp_path, 'train.csv', 'image,label\n0.png,dog\n1.png,cat\n')
    write(tmp_path, 'val.csv', 'image,label\n2.png,dog\n')
    assert said(read_dataset(tmp_path, 'csv'), 'label', 'class_name') == [(1, 'dog'), (0, 'cat')]
    assert said(read_dataset(tmp_path, 'csv', 'valid'), 'label') == [(1,)]                     # numbered as in training
    with pytest.raises(ValueError, match='has no list for test beside train.csv'): read_dataset(tmp_path, 'csv', 'test')
    assert list(check_dataset(tmp_path, 'csv')['splits']) == ['train', 'valid']
    write(tmp_path, 'val.csv', 'image,label\n2.png,cow\n')
    with pytest.raises(ValueError, match="val.csv, line 2: label 'cow' is none of the 2 classes"): read_dataset(tmp_path, 'csv', 'valid')


def test_folder_of_hugging_face(tmp_path):
    picture(tmp_path, 'train/a.png')
    write(tmp_path, 'train/metadata.csv', 'file_name,text\na.png,a sheet\n')
    assert said(read_dataset(tmp_path, 'csv'), 'image', 'caption') == [('train/a.png', 'a sheet')]


def test_a_column_for_the_split(tmp_path):
    for k in range(3): picture(tmp_path, f'{k}.png')
    write(tmp_path, 'a.csv', 'image,caption,split\n0.png,x,train\n1.png,y,VAL\n2.png,z,holiday\n')
    data = read_dataset(tmp_path, 'csv', 'valid', on_error='skip')
    assert said(data, 'caption') == [('y',)] and data.problems.first == [f"{tmp_path/'a.csv'}, line 4: split 'holiday' is unknown"]


def test_whole_numbers_stay_labels(tmp_path):
    for k in range(2): picture(tmp_path, f'{k}.png')
    write(tmp_path, 'train.csv', 'image,label\n0.png,10\n1.png,2\n')
    assert said(read_dataset(tmp_path, 'csv'), 'label') == [(10,), (2,)]


@pytest.mark.parametrize('row, words', [
    ('a.png', 'has 1 fields for 3 columns'), ('a.png,b,c,d', 'has 4 fields for 3 columns'), (',a sheet,green', 'image is empty'), ('a.png,  ,green', "caption is '  '"), ('gone.png,a sheet,green', 'gone.png is not there'),
    ('ok.png,first,green', 'ok.png occurs twice'), ('ok.png,more,red', 'ok.png has two labels'), ('a.png,b,', "label '' is none"), ('/etc/passwd,b,green', 'absolute path'), ('../a.png,b,green', 'leads out'),
    ('link.png,b,green', 'by a link'), ('a.png,"b,green', 'is not CSV'), ('a.png,"b"c,green', 'is not CSV')])
def test_broken_rows(row, words, tmp_path):
    folder = tmp_path/'data'
    for name in ('ok.png', 'a.png', 'z.png'): picture(folder, name)
    picture(tmp_path, 'a.png')
    os.symlink(tmp_path/'a.png', folder/'link.png')
    write(folder, 'my.csv', f'image,caption,label\nok.png,first,green\nz.png,z,red\n{row}\n')
    with pytest.raises(ValueError) as caught: read_dataset(folder, 'csv', 'all')
    assert f'{folder/"my.csv"}, line 4: ' in str(caught.value) and words in str(caught.value)
    data = read_dataset(folder, 'csv', 'all', on_error='skip')
    assert len(data) == 2 and data.problems.count == 1
    assert check_dataset(folder, 'csv')['broken'] == 1


@pytest.mark.parametrize('content, words', [(b'', 'is empty'), (b'image,caption\n', 'has no row'), (b'\xff\xfe\x00\n', 'UTF-8'), (b'image,image\na,b\n', 'two columns'), (b'"image,caption\na,b\n', 'is not CSV')])
def test_broken_files(content, words, tmp_path):
    write(tmp_path, 'my.csv', content)
    with pytest.raises(ValueError) as caught: read_dataset(tmp_path, 'csv', 'all')
    assert str(tmp_path/'my.csv') in str(caught.value) and words in str(caught.value)


def test_no_csv(tmp_path):
    with pytest.raises(ValueError, match='has no CSV file'): read_dataset(tmp_path, 'csv', 'all')
    with pytest.raises(ValueError, match='has no CSV file'): check_dataset(tmp_path, 'csv')
    with pytest.raises(ValueError, match="csv has no split 'holiday', only train, valid, test, all"): read_dataset(tmp_path, 'csv', 'holiday')


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(['image', 'caption', 'label', 'split', 'a.png', 'train', '"', ',', ';', '\n', '\r\n', '\t', ' ', '\0', '7', 'é']), max_size=30).map(lambda p: ''.join(p).encode())))
def test_any_bytes_are_rows_or_one_sentence(tmp_path, content):
    picture(tmp_path, 'a.png')
    for content in (content, b'image,caption\na.png,x\n' + content):
        write(tmp_path, 'my.csv', content)
        try: assert len(read_dataset(tmp_path, 'csv', 'all', on_error='skip', size=4)) >= 1
        except ValueError as error: assert str(tmp_path) in str(error) and len(str(error)) < 700
        write(tmp_path, 'meta/train.txt', content)
        try: read_dataset(tmp_path, 'imagenet', on_error='skip')
        except ValueError as error: assert str(tmp_path) in str(error)
