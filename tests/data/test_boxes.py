"Boxes: IoU in its conventions, boxes that follow their picture, RefCOCO as published and broken, detections, and pickles that attack."
import collections
import io
import json
import os
import pickle
import resource
import subprocess
import time
from fractions import Fraction
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.ops import box_iou
from vl_tutor.data.annotations import Problems, read_dataset
from vl_tutor.data.boxes import (clip_boxes, draw_boxes, flip_boxes, from_xywh, grounding_accuracy, iou, iou_inclusive, iou_matrix, iou_ref, mended, positive_box, read_pickle,
                                 read_proposals, scale_boxes, to_xywh)
from vl_tutor.training.released import window

matplotlib.use('Agg')
quick = settings(max_examples=100, deadline=None, derandomize=True)
whole = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 9), st.integers(1, 9))                  # x y w h
number = st.floats(-50, 50, width=32)
broken_or_not = st.tuples(number, number, number, number)


# ---- overlap ----

def exact(a, b):
    "IoU of two x y w h boxes in fractions"
    side = lambda k: max(0, min(a[k] + a[k+2], b[k] + b[k+2]) - max(a[k], b[k]))
    shared = side(0)*side(1)
    return Fraction(shared, a[2]*a[3] + b[2]*b[3] - shared)


@quick
@given(whole, whole)
def test_iou_of_whole_boxes(a, b):
    left, right = from_xywh(a), from_xywh(b)
    corners = [x.int().tolist() for x in (left, right)]
    assert iou(left, right).item() == pytest.approx(float(exact(a, b)), abs=1e-6)
    assert iou_ref(*corners) == pytest.approx(float(exact(a, b)))
    assert torch.allclose(iou_matrix(left[None], right[None]), box_iou(left[None], right[None]))


@quick
@given(broken_or_not, broken_or_not)
def test_iou_bounds_and_symmetry(a, b):
    found = iou(a, b)
    assert 0 <= found <= 1 and torch.equal(found, iou(b, a))
    assert iou(a, a) in (0, 1)


@quick
@given(whole, whole, st.integers(-20, 20), st.integers(1, 7))
def test_iou_moves_and_scales_with_the_picture(a, b, shift, scale):
    a, b = from_xywh(a), from_xywh(b)
    assert torch.allclose(iou(a + shift, b + shift), iou(a, b), atol=1e-6) and torch.allclose(iou(a*scale, b*scale), iou(a, b), atol=1e-6)
    assert torch.allclose(iou(flip_boxes(a, 30), flip_boxes(b, 30)), iou(a, b), atol=1e-6)


def slow_inclusive(a, b):
    "Pixels of both boxes where the last one belongs to them; an overlap that is one pixel wide or high is none"
    pixels = lambda box: {(x, y) for x in range(box[0], box[0] + box[2]) for y in range(box[1], box[1] + box[3])}
    both = pixels(a) & pixels(b)
    if len({x for x, _ in both}) < 2 or len({y for _, y in both}) < 2: both = set()
    return len(both)/(len(pixels(a)) + len(pixels(b)) - len(both))


@quick
@given(whole, whole)
def test_inclusive_iou(a, b):
    found = iou_inclusive(a, b).item()
    assert found == pytest.approx(slow_inclusive(a, b), abs=1e-6) and 0 <= found <= 1 and found == iou_inclusive(b, a).item()
    if exact(a, b) and found: assert found == pytest.approx(float(exact(a, b)), abs=1e-6)


def test_inclusive_iou_of_the_released_code():
    "Two numbers stored from SIMLA's own function (golden/simla/data_rules)"
    a = torch.tensor([[0., 0, 5, 5], [0.9922903776168823, 7.710312008857727, 21.811936497688293, 10.637301206588745]], dtype=torch.float64)
    b = torch.tensor([[4., 4, 5, 5], [2.5211817026138306, 13.386978507041931, 9.694713950157166, 10.748040676116943]], dtype=torch.float64)
    assert iou_inclusive(a, b).tolist() == [0, 0.16691205770073578]


def test_matrix_and_broadcast():
    a, b = torch.rand(3, 2, 4), torch.rand(3, 5, 4)
    assert iou_matrix(a, b).shape == (3, 2, 5) and iou(a[:, :1], b).shape == (3, 5)
    assert iou_matrix(torch.zeros(0, 4), b[0]).shape == (0, 5)
    assert torch.equal(iou_matrix(a, b)[1, 0, 3], iou(a[1, 0], b[1, 3]))
    for bad in ([1, 2, 3], 7, [[1, 2]]):
        with pytest.raises(ValueError, match='four numbers'): iou(bad, bad)


def test_grounding_accuracy():
    boxes = from_xywh([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]])
    guesses = from_xywh([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1]])                  # IoU 1, exactly 1/2, 1/4
    assert grounding_accuracy(guesses, boxes) == pytest.approx(2/3) and grounding_accuracy(guesses, boxes, least=.51) == pytest.approx(1/3)
    assert grounding_accuracy(to_xywh(guesses), to_xywh(boxes), measure=iou_inclusive) == pytest.approx(2/3)
    with pytest.raises(ValueError, match=r'\(2, 4\) guesses for \(3, 4\) boxes'): grounding_accuracy(guesses[:2], boxes)


# ---- boxes follow the picture ----

@quick
@given(whole)
def test_there_and_back(a):
    box = from_xywh(a)
    assert to_xywh(box).tolist() == list(a)
    assert flip_boxes(flip_boxes(box, 30), 30).tolist() == box.tolist()
    assert torch.allclose(scale_boxes(scale_boxes(box, (30, 20), (7, 9)), (7, 9), (30, 20)), box, atol=1e-4)
    clipped = clip_boxes(box, 10, 8)
    assert (clipped >= 0).all() and (clipped <= torch.tensor([10., 8, 10, 8])).all() and clip_boxes(box, 100, 100).tolist() == box.tolist()


@quick
@given(whole)
def test_boxes_are_where_the_pixels_are(a):
    "A white rectangle, mirrored and enlarged as a picture, is where the box says"
    left, top, right, bottom = from_xywh(a).int().tolist()
    image = torch.zeros(1, 22, 24)
    image[:, top:bottom, left:right] = 1
    def tight(x):
        ys, xs = x[0].nonzero().unbind(1)
        return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]
    assert flip_boxes(from_xywh(a), 24).tolist() == tight(image.flip(2))
    assert scale_boxes(from_xywh(a), (24, 22), (72, 44)).tolist() == tight(image.repeat_interleave(3, 2).repeat_interleave(2, 1))


def test_drawn_boxes_lie_on_the_edges():
    ax = draw_boxes(torch.zeros(3, 10, 20, dtype=torch.uint8), [[2, 1, 12, 5], [0, 0, 3, 3]], ['a', 'b'])
    second, first = ax.patches
    assert (first.get_x(), first.get_y(), first.get_width(), first.get_height()) == (1.5, .5, 10, 4)
    assert {t.get_text() for t in ax.texts} == {'a', 'b'} and first.get_edgecolor() != second.get_edgecolor()
    assert draw_boxes(np.zeros((10, 20, 3), np.uint8), torch.tensor([[2, 1, 12, 5]]), ax=ax) is ax


# ---- pickles ----

PLAIN = [dict(ref_id=1, sentences=[dict(sent='the red one', tokens=['the', 'red', 'one'], sent_id=3)], score=.5, big=2**70, none=None, yes=True, pair=(1, 2), some={1, 2})]


@pytest.mark.parametrize('protocol', range(6))
def test_plain_pickles(protocol, tmp_path):
    (tmp_path/'a.p').write_bytes(pickle.dumps(PLAIN, protocol))
    assert read_pickle(tmp_path/'a.p') == PLAIN
    with pytest.raises(ValueError, match='a.p holds a list, not a dict'): read_pickle(tmp_path/'a.p', dict)


def test_as_python_two_wrote_them(tmp_path):
    "Texts as byte strings, letters as unicode objects, long numbers, an OrderedDict"
    for data in (b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nL7L\nsa.", b"\x80\x02]q\x00}q\x01(U\x04sentq\x02U\x05caf\xc3\xa9q\x03U\x06ref_idq\x04K\x07ua.",
                 b"(lp0\n(dp1\nVsent\np2\nVcaf\xe9\np3\nsVref_id\np4\nI7\nsa."):
        (tmp_path/'a.p').write_bytes(data)
        row, = read_pickle(tmp_path/'a.p')
        assert mended(row['sent']) == 'café' and row['ref_id'] == 7
    (tmp_path/'a.p').write_bytes(pickle.dumps([collections.OrderedDict(a=1), np.float64(2.5), np.int64(3)], 2))
    assert read_pickle(tmp_path/'a.p') == [dict(a=1), 2.5, 3]


class Attack:
    def __init__(self, mark, how): self.mark, self.how = str(mark), how
    def __reduce__(self):
        code = f'open({self.mark!r}, "w").write("x")'
        return {'system': (os.system, (f'touch {self.mark}',)), 'exec': (exec, (code,)), 'eval': (eval, (code,)), 'open': (open, (self.mark, 'w')), 'popen': (subprocess.Popen, (['touch', self.mark],)),
                'getattr': (getattr, (dict, 'fromkeys')), 'partial': (__import__('functools').partial, (os.system, f'touch {self.mark}')), 'import': (__import__, ('antigravity',)),
                'torch': (torch.load, (self.mark,)), 'fraction': (Fraction, (1, 2)), 'path': (io.FileIO, (self.mark, 'w'))}[self.how]


@pytest.mark.parametrize('how', ['system', 'exec', 'eval', 'open', 'popen', 'getattr', 'partial', 'import', 'torch', 'fraction', 'path'])
@pytest.mark.parametrize('place', ['top', 'sentence', 'key'])
def test_hostile_pickles_run_nothing(how, place, tmp_path):
    evil = Attack(tmp_path/'mark', how)
    obj = dict(top=evil, sentence=[dict(ref_id=1, sentences=[dict(sent=evil)])], key=[{1: [evil]}])[place]
    (tmp_path/'refcoco').mkdir()
    write(tmp_path/'refcoco'/'instances.json', dict(images=[], annotations=[]))
    for protocol in range(6):
        (tmp_path/'refcoco'/'refs(unc).p').write_bytes(pickle.dumps(obj, protocol))
        for on_error in ('raise', 'skip'):
            with pytest.raises(ValueError, match=r'refs\(unc\).p is no pickle of plain lists: it asks for \w+\.\w+') as caught: read_dataset(tmp_path, 'refcoco', 'val', on_error=on_error)
            assert '\n' not in str(caught.value)
    assert not (tmp_path/'mark').exists()
    if how in ('system', 'exec', 'eval', 'open', 'path'):
        pickle.loads((tmp_path/'refcoco'/'refs(unc).p').read_bytes())                  # the attack is a real one
        assert (tmp_path/'mark').exists()


@pytest.mark.parametrize('payload', [b"cos\nsystem\n(S'touch {}'\ntR.", b"c__builtin__\neval\n(S'open(\"{}\",\"w\")'\ntR.", b"(S'touch {}'\nios\nsystem\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x00\x85R.",
                                     b'Ppersistent\n.', b"\x82\x01.", b'', b'.', b'\x80\x7f.', b'(lp0\n(dp1\nS', b'not a pickle', b'I7\n.', b']' * 10 + b'.', b'cbuiltins\nbytes\n(I1000000000000\ntR.',
                                     b'\x80\x02U\xff.', b'\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.', b'ccollections\nnamedtuple\n.', b'cbuiltins\nlist.append\n.'])
def test_raw_pickles(payload, tmp_path):
    (tmp_path/'refs.p').write_bytes(payload.replace(b'{}', str(tmp_path/'mark').encode()))
    try: assert read_pickle(tmp_path/'refs.p') == []
    except ValueError as error: assert 'refs.p' in str(error) and '\n' not in str(error)
    else: assert payload[:1] == b']'
    assert not (tmp_path/'mark').exists()


def test_small_files_stay_small(tmp_path):
    "A huge memo index, a huge length and a huge frame cost neither memory nor time"
    start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for payload in (b'\x80\x02]r\xff\xff\xff\x7f.', b'\x96' + (2**34).to_bytes(8, 'little') + b'.', b'\x80\x04\x95' + (2**40).to_bytes(8, 'little') + b'].', b'(lp2000000000\n.'):
        (tmp_path/'refs.p').write_bytes(payload)
        try: assert read_pickle(tmp_path/'refs.p') == []
        except ValueError as error: assert 'refs.p' in str(error)
    assert time.perf_counter() - start < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000


@pytest.mark.parametrize('name', [b'ccollections\nCounter\n', b'ccollections\nOrderedDict\n', b'ctorch._utils\n_rebuild_tensor\n', b'cnumpy\ndtype\n', b'c__builtin__\ndict\n'])
@pytest.mark.parametrize('state', [b'(N(dp0\nVupdate\nNst', b'(dp0\nV__doc__\nVowned\ns'])
def test_no_class_is_changed(name, state, tmp_path):
    "State for a class would change it for the whole process"
    (tmp_path/'refs.p').write_bytes(name + state + b'b.')
    with pytest.raises(ValueError, match='would change a class'): read_pickle(tmp_path/'refs.p')
    assert collections.Counter('aab').update is not None and collections.Counter.__doc__ != 'owned' and window.__doc__ != 'owned'


def test_pickles_that_are_not_there(tmp_path):
    for path in (tmp_path/'gone.p', tmp_path):
        with pytest.raises(ValueError, match='cannot be read'): read_pickle(path)


@quick
@given(st.text(max_size=12))
def test_mended(text):
    assert mended(text.encode().decode('latin1')) == text
    assert text.isascii() is False or mended(text) == text


# ---- RefCOCO ----

def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def sentence(number, text): return dict(sent_id=number, sent=text, raw=f'{text}!', tokens=text.split())
def ref(number, ann, image, split, *said): return dict(ref_id=number, ann_id=ann, image_id=image, split=split, category_id=1, file_name='COCO_train2014_7_1.jpg', sent_ids=[],
                                                       sentences=[sentence(10*number + k, s) for k, s in enumerate(said)])


REFS = [ref(1, 70, 7, 'train', 'red one', 'left circle'), ref(2, 71, 7, 'train', 'small thing'), ref(3, 80, 8, 'val', 'blue'), ref(4, 90, 9, 'testA', 'man'), ref(5, 91, 9, 'testB', 'dog', 'brown dog')]
THINGS = [dict(id=70, image_id=7, bbox=[2, 1, 10.5, 4]), dict(id=71, image_id=7, bbox=[0, 0, 3, 3]), dict(id=80, image_id=8, bbox=[5, 5, 4, 4]), dict(id=90, image_id=9, bbox=[1, 1, 2, 2]),
          dict(id=91, image_id=9, bbox=[3, 3, 5, 5]), dict(id=92, image_id=9, bbox=[0, 0, 20, 10])]


def dataset(folder, name='refcoco', by='unc', refs=REFS, things=THINGS, images=(7, 8, 9)):
    for k in (7, 8, 9):
        (folder/'train2014').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 10), (k, 0, 0)).save(folder/'train2014'/f'COCO_train2014_{k:012d}.jpg', 'PNG')
    pictures = [dict(id=k, file_name=f'COCO_train2014_{k:012d}.jpg', width=20, height=10) for k in images] if all(isinstance(k, int) for k in images) else list(images)
    write(folder/name/'instances.json', dict(info={}, images=pictures, annotations=things, categories=[]))
    (folder/name/f'refs({by}).p').write_bytes(pickle.dumps(refs, 2))
    return folder


def test_one_sample_for_each_expression(tmp_path):
    dataset(tmp_path)
    count = {split: [r['expression'] for r in read_dataset(tmp_path, 'refcoco', split).records] for split in ('train', 'val', 'testA', 'testB', 'test')}
    assert count == dict(train=['red one', 'left circle', 'small thing'], val=['blue'], testA=['man'], testB=['dog', 'brown dog'], test=['man', 'dog', 'brown dog'])
    first = read_dataset(tmp_path, 'refcoco', 'train', size=40)[0]
    assert first['box'].tolist() == [4, 4, 25, 20]                                     # twice as wide, four times as high
    assert first['proposals'].tolist() == [[4, 4, 25, 20], [0, 0, 6, 12]] and first['image'].shape == (3, 40, 40)
    assert first['image_id'] == 7 and first['ref_id'] == 1 and first['source'].endswith('refs(unc).p, reference 0')
    batch = read_dataset(tmp_path, 'refcoco', 'test', size=8).batch([0, 1, 2])
    assert batch['box'].shape == (3, 4) and batch['proposals'].shape == (3, 3, 4)


def test_the_folder_may_be_the_data_set_itself(tmp_path):
    dataset(tmp_path)
    for file in (tmp_path/'refcoco').iterdir(): file.rename(tmp_path/file.name)
    assert len(read_dataset(tmp_path, 'refcoco', 'train')) == 3


def test_refcocog_by_its_two_authors(tmp_path):
    dataset(tmp_path, 'refcocog', 'umd'), dataset(tmp_path, 'refcocog', 'google', refs=REFS[:1])
    assert len(read_dataset(tmp_path, 'refcocog', 'train')) == 3 and len(read_dataset(tmp_path, 'refcocog', 'train', by='google')) == 2
    with pytest.raises(ValueError, match="no split 'testA'"): read_dataset(tmp_path, 'refcocog', 'testA')
    with pytest.raises(ValueError, match=r'refs\(unc\).p'): read_dataset(tmp_path, 'refcoco+', 'train')


@pytest.mark.parametrize('name, content', [
    ('refcoco/dets.json', [dict(image_id=7, box=[1, 1, 4, 4], category_id=3, score=.9, det_id=0), dict(image_id=7, box=[0, 0, 2, 2]), dict(image_id=8, box=[1, 1, 1, 1])]),
    ('detections/refcoco_unc/res101_coco_minus_refer_notime_dets.json', dict(dets=[dict(image_id=7, box=[1, 1, 4, 4]), dict(image_id=7, box=[0, 0, 2, 2])])),
    ('dets.json', {'7': [[1, 1, 4, 4, .9, 3], [0, 0, 2, 2, .5, 1]], '8': [[1, 1, 1, 1]]}), ('dets.json', {'7': [dict(box=[1, 1, 4, 4], score=1), dict(box=[0, 0, 2, 2])]})])
def test_detections(name, content, tmp_path):
    dataset(tmp_path)
    write(tmp_path/name, content)
    train, test = (read_dataset(tmp_path, 'refcoco', split) for split in ('train', 'test'))
    assert train[0]['proposals'].tolist() == [[1, 1, 5, 5], [0, 0, 2, 2]]
    assert test[0]['proposals'].shape == (0, 4)                                        # nothing was detected there


@pytest.mark.parametrize('bad', [[dict(image_id=7, box=[1, 1, 0, 4])], [dict(image_id=7, box=[1, 1, 4])], [dict(image_id=7, box='1 1 4 4')], [dict(box=[1, 1, 4, 4])], [7], {'7': [[1, 1, 4, None]]}, {'7': 5}, {'7': [7]},
                                 {'7': [dict(score=1)]}, [dict(image_id=7, box=[1, 1, float('nan'), 4])], [dict(image_id=7, box=[1, 1, 1e9, 4])], [dict(image_id=7, box=[1, True, 4, 4])]])
def test_broken_detections(bad, tmp_path):
    write(tmp_path/'dets.json', bad)
    with pytest.raises(ValueError, match=r'dets.json, (detection 0|entry .7.): ') as caught: read_proposals(tmp_path/'dets.json', Problems())
    assert '\n' not in str(caught.value)
    problems = Problems('skip')
    assert read_proposals(tmp_path/'dets.json', problems) == {} and problems.count == 1


def test_detections_of_another_kind(tmp_path):
    for content in ('7', '"x"', 'null', '[', ''):
        write(tmp_path/'dets.json', content)
        with pytest.raises(ValueError, match='dets.json'): read_proposals(tmp_path/'dets.json', Problems('skip'))


@pytest.mark.parametrize('change, words, left', [
    (dict(ref=dict(ann_id=99)), 'object 99 is not in instances.json', 1), (dict(ref=dict(image_id=8)), 'object 70 is in picture 7, not in 8', 1), (dict(ref=dict(image_id=99)), 'picture 99 is not', 1),
    (dict(ref=dict(ref_id=2)), 'ref_id 2 occurs twice', 2), (dict(ref=dict(sentences=[dict(sent=' ')])), 'sent is', 1), (dict(ref=dict(sentences=['x'])), 'object with fields', 1), (dict(ref=dict(split=None)), 'split is None', 1),
    (dict(ref=dict(sentences=[dict(sent=7)])), 'sent is 7', 1), (dict(thing=dict(bbox=[1, 2, -3, 4])), 'not left, top, width and height', 1), (dict(thing=dict(bbox=[1, 2, 3])), 'not left, top', 1),
    (dict(thing=dict(bbox=[1, 2, 3, float('inf')])), 'not left, top', 1), (dict(thing=dict(bbox=None)), 'bbox is None', 1), (dict(thing=dict(id=71)), 'id 71 occurs twice', 1)])
def test_broken_references(change, words, left, tmp_path):
    refs, things = [dict(REFS[0]) | change.get('ref', {}), REFS[1]], [dict(THINGS[0]) | change.get('thing', {}), *THINGS[1:]]
    dataset(tmp_path, refs=refs, things=things)
    with pytest.raises(ValueError, match='(reference|annotation) [01]: ') as caught: read_dataset(tmp_path, 'refcoco', 'train')
    assert words in str(caught.value) and '\n' not in str(caught.value)
    data = read_dataset(tmp_path, 'refcoco', 'train', on_error='skip')
    assert len(data) == left and data.problems.count >= 1


@pytest.mark.parametrize('picture, words', [(dict(id=7, file_name='../x.jpg', width=20, height=10), 'leads out of'), (dict(id=7, file_name='/x.jpg', width=20, height=10), 'absolute'),
                                            (dict(id=7, width=20, height=10), 'file_name'), (dict(id=7, file_name='gone.jpg', width=20, height=10), 'is not there')])
def test_broken_pictures_of_instances(picture, words, tmp_path):
    dataset(tmp_path, images=[picture])
    with pytest.raises(ValueError, match=words): read_dataset(tmp_path, 'refcoco', 'train')
    with pytest.raises(ValueError, match=words): read_dataset(tmp_path, 'refcoco', 'train', on_error='skip')       # nothing is left


def test_a_box_beside_its_picture_is_named(tmp_path):
    dataset(tmp_path, things=[THINGS[0] | dict(bbox=[50, 1, 4, 4]), *THINGS[1:]])
    with pytest.raises(ValueError, match=r'reference 0: the box \[50.0, 1.0, 54.0, 5.0\] is empty or beside the picture of 20×10'): read_dataset(tmp_path, 'refcoco', 'train')[0]


def test_truncated_refs_and_instances(tmp_path):
    dataset(tmp_path)
    for name in ('refs(unc).p', 'instances.json'):
        data = (tmp_path/'refcoco'/name).read_bytes()
        for cut in (0, 1, len(data)//2, len(data) - 2):
            (tmp_path/'refcoco'/name).write_bytes(data[:cut])
            with pytest.raises(ValueError, match=name.replace('(', r'\(').replace(')', r'\)')): read_dataset(tmp_path, 'refcoco', 'train', on_error='skip')
        (tmp_path/'refcoco'/name).write_bytes(data)
    assert len(read_dataset(tmp_path, 'refcoco', 'train')) == 3


def test_positive_box():
    assert positive_box([1, 2, 3, 4]) == positive_box((1, 2, 3, 4, .5)) == [1, 2, 4, 6]
    for bad in (None, 7, 'abcd', [1, 2, 3], [1, 2, 0, 4], [1, 2, 3, float('nan')], [True, 2, 3, 4], {}, [1e7, 1, 1, 1], [float('-inf'), 1, 1, 1]):
        with pytest.raises(ValueError, match='not left, top'): positive_box(bad)


# ---- SIMLA's lists ----

def test_simla_grounding(tmp_path):
    dataset(tmp_path, 'refcoco+')
    name = lambda k: f'train2014/COCO_train2014_{k:012d}.jpg'
    write(tmp_path/'refcoco+_train.json', [dict(image=name(7), text='red one')])
    write(tmp_path/'refcoco+_test.json', [dict(image=name(8), text='Blue', ref_id=3), dict(image=name(9), text='Man', ref_id=4), dict(image=name(9), text='Dog', ref_id=5)])
    got = {split: [(r['expression'], r.get('box')) for r in read_dataset(tmp_path, 'simla_grounding', split).records] for split in ('train', 'val', 'testA', 'testB', 'test')}
    assert got == dict(train=[('red one', None)], val=[('Blue', [5, 5, 9, 9])], testA=[('Man', [1, 1, 3, 3])], testB=[('Dog', [3, 3, 8, 8])], test=[('Man', [1, 1, 3, 3]), ('Dog', [3, 3, 8, 8])])
    write(tmp_path/'refcoco+_test.json', [dict(image=name(8), text='Blue', ref_id=99), dict(image=name(8), text='Blue', ref_id=3)])
    with pytest.raises(ValueError, match='record 0: ref_id 99 is not in the refer files'): read_dataset(tmp_path, 'simla_grounding', 'val')
    data = read_dataset(tmp_path, 'simla_grounding', 'val', on_error='skip')
    assert len(data) == 1 and data.problems.count == 1
