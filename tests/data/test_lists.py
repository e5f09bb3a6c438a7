"Lists of captions: every published layout gives the same records, and every broken record is named by file and line."
import json
import os
import random
import pytest
import torch
from PIL import Image
from vl_tutor.data.annotations import check_dataset, detect_format, formats, read_dataset

RED, BLUE = (200, 30, 40), (30, 60, 200)


def picture(folder, path, colour=RED, size=(20, 10)):
    "A small picture somewhere in the folder"
    place = folder/path
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(place, 'PNG')                        # whatever its name says: the content counts


def write(folder, path, content):
    "A text file, or a JSON document from anything else"
    place = folder/path
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes): place.write_bytes(content)
    else: place.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


def lines(*rows): return ''.join(f'{json.dumps(row) if not isinstance(row, str) else row}\n' for row in rows)
def both(folder, *paths):
    for path, colour in zip(paths, (RED, BLUE)): picture(folder, path, colour)


# ---- the layouts: each writes two pictures, the first with two captions, and says which format and split that is ----

ONE, TWO = ['a red sheet', 'all is red'], ['a blue sheet']
NOTES = [dict(id=1, image_id=7, caption=ONE[0]), dict(id=2, image_id=9, caption=TWO[0]), dict(id=3, image_id=7, caption=ONE[1])]


def coco(folder, file, where, key='file_name', **more):
    both(folder, f'{where}/000007.jpg', f'{where}/000009.jpg')
    write(folder, file, dict(images=[{'id': i, key: f'00000{i}.jpg'} | more for i in (7, 9)], annotations=NOTES))


def karpathy(folder, file, where, **more):
    both(folder, f'{where}/7.jpg', f'{where}/9.jpg')
    def row(i, said, split): return dict(filename=f'{i}.jpg', imgid=i, split=split, sentids=[0], **more,
                                         sentences=[dict(tokens=s.split(), raw=s, imgid=i, sentid=0) for s in said])
    write(folder, file, dict(images=[row(7, ONE, 'train'), row(8, TWO, 'test'), row(9, TWO, 'restval')], dataset='coco'))


def coco_2017(f): coco(f, 'annotations/captions_train2017.json', 'train2017')
def coco_2014(f): coco(f, 'annotations/captions_val2014.json', 'val2014')
def coco_captioner(f): coco(f, 'train2017.json', 'train2017')
def coco_uni(f): coco(f, 'new_annotations/captions_train113k.json', 'coco_origin/train2014', file_path='train2014')
def coco_flickr(f): coco(f, 'captions_test.json', 'flickr30k_images', key='filename')
def karpathy_coco(f): karpathy(f, 'karpathy/dataset_coco.json', 'val2014', filepath='val2014')
def karpathy_flickr(f): karpathy(f, 'karpathy/dataset_flickr30k.json', 'flickr30k-images')


def flickr_token(f):
    both(f, 'flickr30k-images/7.jpg', 'flickr30k-images/9.jpg')
    write(f, 'results_20130124.token', f'7.jpg#0\t{ONE[0]}\n7.jpg#1\t{ONE[1]}\n9.jpg#0\t{TWO[0]}\n')


def flickr_token_split(f):
    flickr_token(f)
    write(f, 'val.txt', '9\n7\n')


def flickr_csv(f):
    both(f, 'flickr30k_images/7.jpg', 'flickr30k_images/9.jpg')
    write(f, 'flickr30k_images/results.csv', f'image_name| comment_number| comment\n7.jpg| 0| {ONE[0]}\n7.jpg| 1| {ONE[1]}\n9.jpg| 0| {TWO[0]}\n')


def flickr_jsonlines(f):
    both(f, 'flickr30k-images/7.jpg', 'flickr30k-images/9.jpg')
    write(f, 'all_data_final_test_set0_2014.jsonline', lines(dict(id=7, img_path='7.jpg', sentences=ONE), dict(id=9, img_path='9.jpg', sentences=TWO)))


def cc_tsv(f):
    both(f, 'train_image/00000000.jpg', 'train_image/00000001.jpg')
    write(f, 'Train_GCC-training.tsv', f'{ONE[0]}\thttp://x.org/1.jpg\n{TWO[0]}\thttp://x.org/2.jpg\n')


def cc_12m(f):
    both(f, 'train_image/00000000.jpg', 'train_image/00000001.jpg')
    write(f, 'cc12m.tsv', f'https://x.org/1.jpg\t{ONE[0]}\nhttps://x.org/2.jpg\t{TWO[0]}\n')


def cc_perceiver(f):
    both(f, 'images/1.jpg', 'images/2.jpg')
    write(f, 'valid_dict.json', {'1': dict(video_path='images/1.jpg', text=ONE), '2': dict(video_path='images/2.jpg', text=TWO[0])})


def cc_vilt(f):
    both(f, 'images_train/0000/0000000', 'images_train/0000/0000001')
    write(f, 'train_annot.json', [['images_train/0000/0000000', ONE[0]], ['images_train/0000/0000001', TWO[0]]])


def cc_uni(f):
    both(f, 'train_image/00000000.jpg', 'train_image/00000001.jpg')
    write(f, 'train_spacy.json', lines(dict(image='train_image.zip@/00000000.jpg', caption=ONE[0].split()), dict(image='train_image/00000001.jpg', caption=TWO[0])))


def sbu_texts(f):
    both(f, 'images/1_a.jpg', 'images/2_b.jpg')
    write(f, 'SBU_captioned_photo_dataset_urls.txt', 'http://x.org/1/1_a.jpg\nhttp://x.org/1/2_b.jpg\n')
    write(f, 'SBU_captioned_photo_dataset_captions.txt', f'{ONE[0]}\n{TWO[0]}\n')


def sbu_columns(f):
    both(f, 'images/1_a.jpg', 'images/2_b.jpg')
    write(f, 'sbu-captions-all.json', dict(image_urls=['http://x.org/1_a.jpg', 'http://x.org/2_b.jpg'], user_ids=['u', 'v'], captions=[ONE[0], TWO[0]]))


def sbu_vilt(f):
    both(f, 'images_train/0000/0000000', 'images_train/0000/0000001')
    write(f, 'annot.json', [['images_train/0000/0000000', ONE[0]], ['images_train/0000/0000001', TWO[0]]])


def sbu_uni(f):
    both(f, 'images/1_a.jpg', 'images/2_b.jpg')
    write(f, 'annotations/sbucaptions.json', {'1_a.jpg': ONE[0], '2_b.jpg': TWO[0]})


def region(said, x=1, y=2, w=5, h=4): return dict(region_id=1, image_id=7, phrase=said, x=x, y=y, width=w, height=h)


def vg_regions(f):
    both(f, 'VG_100K/7.jpg', 'images/VG_100K_2/9.jpg')
    write(f, 'image_data.json', [dict(image_id=i, url=f'https://x.edu/VG_100K{e}/{i}.jpg', width=20, height=10, coco_id=None) for i, e in ((7, ''), (9, '_2'))])
    write(f, 'region_descriptions.json', [dict(id=7, regions=[region(s) for s in ONE]), dict(id=9, regions=[region(TWO[0], w=9)])])


def vg_uni(f):
    both(f, 'images/VG_100K/7.jpg', 'images/VG_100K_2/9.jpg')
    write(f, 'annotations/vg_captions_128filter.json', dict(phrase={'7': ONE, '9': TWO}, subset={'7': 'VG_100K/7.jpg', '9': 'VG_100K_2/9.jpg'}))


def simla_pretrain(f):
    both(f, 'train2014/7.jpg', 'train2014/9.jpg')
    write(f, 'coco.json', [dict(image='train2014/7.jpg', caption=ONE), dict(image='train2014/9.jpg', caption=TWO[0])])


def simla_retrieval(f):
    both(f, 'train2014/7.jpg', 'train2014/9.jpg')
    write(f, 'coco_train.json', [dict(image=f'train2014/{i}.jpg', caption=c, image_id=f'coco_{i}') for i, c in ((7, ONE[0]), (9, TWO[0]), (7, ONE[1]))])


def simla_evaluation(f):
    both(f, 'val2014/7.jpg', 'val2014/9.jpg')
    write(f, 'coco_test.json', [dict(image='val2014/7.jpg', caption=ONE), dict(image='val2014/9.jpg', caption=TWO)])


LAYOUTS = [(coco_2017, 'coco', 'train'), (coco_2014, 'coco', 'valid'), (coco_captioner, 'coco', 'train'), (coco_uni, 'coco', 'train'),
           (coco_flickr, 'coco', 'test'), (karpathy_coco, 'karpathy', 'train+restval'), (karpathy_flickr, 'karpathy', 'train+restval'),
           (flickr_token, 'flickr30k', 'all'), (flickr_token_split, 'flickr30k', 'valid'), (flickr_csv, 'flickr30k', 'all'),
           (flickr_jsonlines, 'flickr30k', 'test'), (cc_tsv, 'conceptual_captions', 'train'), (cc_12m, 'conceptual_captions', 'train'),
           (cc_perceiver, 'conceptual_captions', 'valid'), (cc_vilt, 'conceptual_captions', 'train'), (cc_uni, 'conceptual_captions', 'train'),
           (sbu_texts, 'sbu', 'train'), (sbu_columns, 'sbu', 'train'), (sbu_vilt, 'sbu', 'train'), (sbu_uni, 'sbu', 'train'),
           (vg_regions, 'visual_genome', 'train'), (vg_uni, 'visual_genome', 'train'),
           (simla_pretrain, 'simla', 'train'), (simla_retrieval, 'simla', 'train'), (simla_evaluation, 'simla', 'test')]
every = pytest.mark.parametrize('layout, format, split', LAYOUTS, ids=lambda x: getattr(x, '__name__', x))


@every
def test_published_layout(layout, format, split, tmp_path):
    layout(tmp_path)
    data = read_dataset(tmp_path, format, split, size=8)
    assert len(data) == 2
    assert data[0]['caption'] == ONE[0] and data[0]['captions'] in (ONE, ONE[:1])      # lists of pairs have one caption a picture
    assert data[1]['captions'] == TWO
    for sample, colour in zip((data[0], data[1]), (RED, BLUE)):
        assert sample['image'].dtype == torch.uint8 and sample['image'].shape == (3, 8, 8)
        assert sample['image'].float().mean((1, 2)).tolist() == list(colour)
        assert sample['source'].startswith(str(tmp_path))


@every
def test_check_reads_it_end_to_end(layout, format, split, tmp_path):
    layout(tmp_path)
    found = check_dataset(tmp_path, format, split.split('+'))
    assert found['records'] == 2 and found['broken'] == 0
    assert sum(part['media']['files'] for part in found['splits'].values()) == 2
    assert detect_format(tmp_path) == format


@every
def test_missing_picture(layout, format, split, tmp_path):
    layout(tmp_path)
    gone = sorted(p for p in tmp_path.rglob('*') if p.is_file() and p.read_bytes()[:4] == b'\x89PNG')[0]
    gone.unlink()
    with pytest.raises(ValueError, match='is not there'): read_dataset(tmp_path, format, split)
    data = read_dataset(tmp_path, format, split, on_error='skip')
    assert len(data) == 1 and data.problems.count == 1 and gone.name in data.problems.first[0]


@every
def test_broken_picture_is_named_and_left_out(layout, format, split, tmp_path):
    layout(tmp_path)
    bad = sorted(p for p in tmp_path.rglob('*') if p.is_file() and p.read_bytes()[:4] == b'\x89PNG')[1]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=f'{bad.name} is '): read_dataset(tmp_path, format, split, size=8).batch([0, 1])
    data = read_dataset(tmp_path, format, split, size=8, on_error='skip')
    for _ in range(2): assert data.batch([0, 1])['caption'] == [data.records[0]['caption']]
    assert data.problems.count == 1 and data.left_out() == [data.records[1]['source']]
    found = check_dataset(tmp_path, format, split.split('+'))
    assert (found['records'], found['broken']) == (1, 1)


def annotation(folder):
    "The largest file that is no picture: the list"
    return max((p for p in folder.rglob('*') if p.is_file() and p.read_bytes()[:4] != b'\x89PNG'), key=lambda p: ('urls' not in p.name and p.name != 'image_data.json' and p.suffix != '.txt' or 'captions' in p.name, p.stat().st_size))


@every
def test_truncated_list(layout, format, split, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    try: read_dataset(tmp_path, format, split)
    except ValueError as error:
        assert str(file) in str(error) and '\n' not in str(error)
        assert 'line' in str(error)
    else: assert file.suffix in ('.tsv', '.token', '.csv', '.txt')              # a line cut short is still a line


@every
@pytest.mark.parametrize('content', [b'', b'\xff\xfe\x00broken', b'[1, 2', b'"text"\n', b'[[[[' * 50_000, b'{}', b'[]', b'7\n'], ids='empty binary open text deep object list number'.split())
def test_another_content(layout, format, split, content, tmp_path):
    layout(tmp_path)
    annotation(tmp_path).write_bytes(content)
    with pytest.raises(ValueError) as caught: read_dataset(tmp_path, format, split)
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 600
    try: read_dataset(tmp_path, format, split, on_error='skip')
    except ValueError as error: assert str(tmp_path) in str(error)
    else: assert layout is sbu_texts                                        # where any line is a caption


@every
def test_not_utf8(layout, format, split, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'blue', b'bl\xfce'))
    with pytest.raises(ValueError, match='UTF-8'): read_dataset(tmp_path, format, split)


@every
@pytest.mark.parametrize('evil', ['/etc/passwd', '../secret.png', 'a/../../secret.png', 'C:\\secret.png', '\\\\host\\secret.png', 'link/secret.png', 'link.png', ''])
def test_paths_stay_inside(layout, format, split, evil, tmp_path):
    folder, outside = tmp_path/'data', tmp_path/'outside'
    folder.mkdir()
    layout(folder)
    picture(outside, 'secret.png')
    picture(tmp_path, 'secret.png')
    os.symlink(outside, folder/'link')
    os.symlink(outside/'secret.png', folder/'link.png')
    file = annotation(folder)
    names = {json.dumps(p.relative_to(folder).as_posix())[1:-1] for p in folder.rglob('*') if p.suffix in ('.jpg', '') and p.is_file()}
    text, bad = file.read_text(), json.dumps(evil)[1:-1] if file.suffix not in ('.token', '.csv', '.tsv', '.txt') else evil
    tail = sorted({t for n in names for t in (n, *(n.split('/', k)[-1] for k in (1, 2, 3))) if t in text or f'.zip@/{t}' in text}, key=len)
    if file.suffix in ('.tsv', '.txt') or format == 'sbu' and file.name == 'sbu-captions-all.json' or layout in (vg_regions, flickr_token_split):
        return                                                              # there, pictures are named by number, by the end of a URL, or twice
    assert tail
    file.write_text(text.replace(tail[-1], bad))
    with pytest.raises(ValueError) as caught: read_dataset(folder, format, split)
    assert 'secret' not in str(caught.value) or any(w in str(caught.value) for w in ('absolute', 'leads out', 'is not there'))
    found = read_dataset(folder, format, split, on_error='skip') if len(tail) > 1 else None
    assert found is None or len(found) < 2


# ---- what is wrong with one record, in each kind of file ----

def fails(folder, format, split, *words):
    with pytest.raises(ValueError) as caught: read_dataset(folder, format, split)
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert '\n' not in str(caught.value)
    found = check_dataset(folder, format, split.split('+'))
    assert found['broken'] or any(part['error'] for part in found['splits'].values())
    return found


@pytest.mark.parametrize('change, words', [
    (dict(images=None), ['images', 'not of the right type']), (dict(images=[]), ['about image 7, which is not listed', 'annotation 0']), (dict(annotations={}), ['annotations']),
    (dict(images=[dict(id=7)]), ['image 0', "no field 'file_name'"]), (dict(images=[7]), ['image 0', 'not 7']), (dict(images=[dict(id=7, file_name=3)]), ['file_name is 3']),
    (dict(images=[dict(id=True, file_name='a')]), ['id is True']), (dict(images=[dict(id=5, file_name='000007.jpg')]), ['image 5 has no caption']),
    (dict(images=[dict(id=7, file_name='000007.jpg')]*2), ['image 1', 'image id 7 occurs twice']),
    (dict(annotations=[dict(id=1, image_id=7)]), ['annotation 0', "no field 'caption'"]), (dict(annotations=[dict(id=1, image_id=7, caption=5)]), ['caption is 5']),
    (dict(annotations=[dict(id=1, image_id=7, caption=' ')]), ['annotation 0', "caption is ' '"]), (dict(annotations=[NOTES[0], NOTES[0]]), ['annotation 1', 'annotation id 1 occurs twice']),
    (dict(annotations=[dict(id=1, image_id=7, caption='a \ud800 b')]), ['half of a character'])])
def test_coco_records(change, words, tmp_path):
    coco_2017(tmp_path)
    file = annotation(tmp_path)
    write(tmp_path, file.relative_to(tmp_path), {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None or k != 'x'})
    fails(tmp_path, 'coco', 'train', str(file), *words)


def test_coco_counts_and_keeps_five(tmp_path):
    coco_2017(tmp_path)
    file = annotation(tmp_path)
    found = json.loads(file.read_text())
    found['annotations'] += [dict(id=k, image_id=7, caption=f'number {k}') for k in range(10, 15)] + [dict(id=99, image_id=7)]
    found['images'].insert(1, dict(id=8, file_name='000008.jpg'))
    write(tmp_path, file.relative_to(tmp_path), found)
    data = read_dataset(tmp_path, 'coco', on_error='skip', keep=5)
    assert data.problems.count == 2 and len(data) == 2
    assert data[0]['captions'] == [*ONE, 'number 10', 'number 11', 'number 12'] and data[0]['image_id'] == 7
    assert len(read_dataset(tmp_path, 'coco', on_error='skip')[0]['captions']) == 7
    each = read_dataset(tmp_path, 'coco', on_error='skip', each=True)
    assert len(each) == 8 and each[1]['caption'] == ONE[1] and len(each[1]['captions']) == 7


@pytest.mark.parametrize('change, words', [
    (dict(filename=None), ["no field 'filename'"]), (dict(split='dev'), ["split 'dev' is unknown"]), (dict(sentences=[]), ['caption is []']), (dict(sentences=[dict(tokens=[])]), ["no field 'raw'"]),
    (dict(sentences='a'), ['sentences']), (dict(filepath=3), ['filepath is 3']), (dict(imgid=9, split='restval'), ['occurs twice'])])
def test_karpathy_records(change, words, tmp_path):
    karpathy_coco(tmp_path)
    file = annotation(tmp_path)
    found = json.loads(file.read_text())
    found['images'][0] = {k: v for k, v in (found['images'][0] | change).items() if v is not None}
    write(tmp_path, file.relative_to(tmp_path), found)
    fails(tmp_path, 'karpathy', 'train+restval', str(file), 'image ', *words)


def test_karpathy_splits(tmp_path):
    karpathy_coco(tmp_path)
    picture(tmp_path, 'val2014/8.jpg')
    assert [len(read_dataset(tmp_path, 'karpathy', s)) for s in ('train', 'restval', 'test', 'train+restval')] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="no record in its split 'valid'"): read_dataset(tmp_path, 'karpathy', 'valid')


@pytest.mark.parametrize('line, words', [('7.jpg#x\ta caption', ['line 2']), ('7.jpg#2\t ', ['line 2']), ('#0\ta caption', ['line 2']), ('7.jpg a caption', ['line 2']), ('7.jpg#0\tagain', ['line 2', 'occurs twice'])])
def test_flickr_lines(line, words, tmp_path):
    flickr_token(tmp_path)
    file = annotation(tmp_path)
    rows = file.read_text().split('\n')
    file.write_text('\n'.join([rows[0], line, *rows[1:]]))
    assert fails(tmp_path, 'flickr30k', 'all', *words)['broken'] == 1


def test_flickr_csv_of_kaggle_has_one_broken_line(tmp_path):
    flickr_csv(tmp_path)
    with open(annotation(tmp_path), 'a') as file: file.write('9.jpg| 4   A dog runs across the grass .\n')
    assert fails(tmp_path, 'flickr30k', 'all', 'line 5')['broken'] == 1


def test_flickr_without_lists_reads_all_or_says_so(tmp_path):
    flickr_token(tmp_path)
    with pytest.raises(ValueError, match="no list of pictures for train.*'all'"): read_dataset(tmp_path, 'flickr30k')
    assert list(check_dataset(tmp_path, 'flickr30k')['splits']) == ['all']
    write(tmp_path, 'train.txt', '7\n')
    assert read_dataset(tmp_path, 'flickr30k', 'train')[0]['image_id'] == '7.jpg'


@pytest.mark.parametrize('layout, broken, words', [
    (cc_tsv, 'only a caption', ['line 2', 'a caption and a URL']), (cc_tsv, 'a\tb', ['line 2']), (cc_tsv, 'a\tb\thttp://c', ['line 2']),
    (cc_uni, '{"image": "a.jpg"}', ['line 2', "no field 'caption'"]), (cc_uni, '{"image": "a.jpg", "caption": 5}', ['caption is 5']), (cc_uni, '{"image": "a.jpg", "caption": []}', ['list of words is []']),
    (cc_uni, '{"image": "a.jpg', ['line 2', 'is not JSON']), (cc_uni, '[1]', ['line 2']), (cc_uni, '{"image": "train_image/00000000.jpg", "caption": "again"}', ['line 2', 'occurs twice']),
    (sbu_texts, '', ["caption is ''"])])
def test_conceptual_and_sbu_lines(layout, broken, words, tmp_path):
    layout(tmp_path)
    file = annotation(tmp_path)
    rows = file.read_text().split('\n')
    file.write_text('\n'.join([rows[0], broken, *rows[1 if layout is not sbu_texts else 2:]]))
    fails(tmp_path, formats()['sbu' if layout is sbu_texts else 'conceptual_captions'].name, 'train', str(file), *words)


def test_conceptual_entries_and_pairs(tmp_path):
    write(tmp_path/'a', 'train_dict.json', {'1': dict(video_path='1.jpg'), '2': 5})
    fails(tmp_path/'a', 'conceptual_captions', 'train', "entry '1'", "no field 'text'")
    write(tmp_path/'b', 'train_annot.json', [['a.jpg', 'b', 'c'], ['a.jpg']])
    fails(tmp_path/'b', 'conceptual_captions', 'train', 'record 0', 'not a path and a caption')
    cc_uni(tmp_path/'c')
    write(tmp_path/'c', 'train_spacy.json', lines(dict(image='train_image/00000000.jpg', caption='a', title='t', description=None), dict(image='train_image/00000001.jpg', caption='b', title='', description='d')))
    assert read_dataset(tmp_path/'c', 'conceptual_captions', size=4).batch([0, 1])['title'] == ['t', '']


def test_sbu_files_must_go_together(tmp_path):
    sbu_texts(tmp_path)
    write(tmp_path, 'SBU_captioned_photo_dataset_urls.txt', 'http://x.org/1/1_a.jpg\n')
    fails(tmp_path, 'sbu', 'train', 'urls.txt, line 2', 'is missing')
    write(tmp_path/'c', 'sbu-captions-all.json', dict(image_urls=['a'], captions=[]))
    fails(tmp_path/'c', 'sbu', 'train', '1 URLs for 0 captions')


@pytest.mark.parametrize('row, words', [
    (dict(id=7), ["no field 'regions'"]), (dict(id='7', regions=[]), ["id is '7'"]), (dict(id=7, regions=[region('a', w=0)]), ['a box of 0×4']), (dict(id=7, regions=[region(' ')]), ['phrase']),
    (dict(id=7, regions=[dict(phrase='a', x=1, y=1, width='9', height=1)]), ["width is '9'"]), (dict(id=9, regions=[region('a')]), ['image id 9 occurs twice']), (7, ['not 7'])])
def test_visual_genome_records(row, words, tmp_path):
    vg_regions(tmp_path)
    file = tmp_path/'region_descriptions.json'
    write(tmp_path, file.name, [json.loads(file.read_text())[1], row])
    fails(tmp_path, 'visual_genome', 'train', 'record 1', *words)


def test_visual_genome_boxes_follow_the_picture(tmp_path):
    vg_regions(tmp_path)
    data = read_dataset(tmp_path, 'visual_genome', size=40)                  # pictures of 20×10
    assert data[0]['boxes'].tolist() == [[2, 8, 12, 24]]*2
    assert read_dataset(tmp_path, 'visual_genome')[0]['boxes'].tolist() == [[1, 2, 6, 6]]*2
    batch = data.batch([0, 1])
    assert batch['boxes'].shape == (2, 2, 4) and batch['boxes_mask'].tolist() == [[True, True], [True, False]]
    assert [r['image_id'] for r in read_dataset(tmp_path, 'visual_genome', smallest=30).records] == [9]
    vg = json.loads((tmp_path/'region_descriptions.json').read_text())
    vg[0]['regions'][0]['x'] = 50
    write(tmp_path, 'region_descriptions.json', vg)
    assert 'beside the picture of 20×10' in check_dataset(tmp_path, 'visual_genome')['splits']['train']['first'][0]


def test_simla_paths_lose_their_prefix(tmp_path):
    both(tmp_path, 'coco/7.jpg', 'coco/9.jpg')
    write(tmp_path, 'cc3m.json', [dict(image='/export/share/datasets/coco/7.jpg', caption=ONE), dict(image='/export/share/datasets/coco/9.jpg', caption=TWO)])
    with pytest.raises(ValueError, match='absolute path'): read_dataset(tmp_path, 'simla')
    assert len(read_dataset(tmp_path, 'simla', prefix='/export/share/datasets/', file='cc3m.json')) == 2
    write(tmp_path, 'x_train.json', [dict(image='coco/7.jpg', caption=c, image_id=k) for k, c in enumerate(ONE)])
    fails(tmp_path, 'simla', 'train', 'record 1', 'two image ids')


# ---- whatever is in a list, there is a sentence ----

JUNK = [None, True, 5, -1, 1e400, 10**30, 'x', '', [], {}, [[]], [None], {'a': 1}, '../x', ['a', 5], 'a\ud800']


def places(found, path=()):
    "Every place in a JSON document"
    yield path
    if isinstance(found, (dict, list)):
        for key in found if isinstance(found, dict) else range(len(found)): yield from places(found[key], (*path, key))


def changed(found, path, junk):
    "The document with something else in one place"
    if not path: return junk
    copy = dict(found) if isinstance(found, dict) else list(found)
    copy[path[0]] = changed(found[path[0]], path[1:], junk)
    return copy


@every
def test_anything_anywhere(layout, format, split, tmp_path):
    "Places of every JSON list, replaced by sixteen kinds of junk: records or a ValueError, never another error"
    layout(tmp_path)
    file = annotation(tmp_path)
    text, by_line = file.read_text(), 'json' not in file.suffix or layout in (cc_uni, flickr_jsonlines)
    documents = [json.loads(line) for line in text.splitlines()] if layout in (cc_uni, flickr_jsonlines) else [] if by_line else [json.loads(text)]
    every_one = [(k, path, junk) for k, document in enumerate(documents) for path in places(document) for junk in JUNK]
    for k, path, junk in random.Random(0).sample(every_one, min(len(every_one), 200)):
        rows = [*documents[:k], changed(documents[k], path, junk), *documents[k + 1:]]
        file.write_text(lines(*map(json.dumps, rows)) if by_line else json.dumps(rows[0]))
        try:
            data = read_dataset(tmp_path, format, split, size=4, on_error='skip')
            assert 1 <= len(data) <= 2
            data.batch(range(len(data)))
        except ValueError as error: assert '\n' not in str(error) and str(tmp_path) in str(error)


# ---- what is asked for must exist ----

@pytest.mark.parametrize('format', ['coco', 'karpathy', 'flickr30k', 'conceptual_captions', 'sbu', 'visual_genome', 'simla'])
def test_nothing_there(format, tmp_path):
    with pytest.raises(ValueError, match='has no .*looked for'): read_dataset(tmp_path, format)
    with pytest.raises(ValueError, match='has no .*looked for'): check_dataset(tmp_path, format)
    with pytest.raises(ValueError, match=f"{format} has no split 'holiday', only train"): read_dataset(tmp_path, format, 'holiday')
    with pytest.raises(ValueError, match='nowhere is not a folder'): read_dataset(tmp_path/'nowhere', format)


def test_list_that_is_a_link_out_of_the_folder(tmp_path):
    coco_captioner(tmp_path/'outside')
    (tmp_path/'data').mkdir()
    os.symlink(tmp_path/'outside'/'train2017.json', tmp_path/'data'/'train2017.json')
    with pytest.raises(ValueError, match='leads out of .* by a link'): read_dataset(tmp_path/'data', 'coco')
