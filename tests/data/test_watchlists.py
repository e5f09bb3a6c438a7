"Lists of videos: every published layout, written here as small files, and what is broken in them."
import json
from functools import partial
import pytest
import torch
from video_files import solid, write_video
from vl_tutor.data.annotations import check_dataset, read_dataset, read_records
from vl_tutor.data.watchlists import FORMATS, MSVD_SPLIT

film = solid(range(0, 90, 10), 32, 24)


def video(folder, *names):
    for name in names: write_video(folder/name, film, codec='mpeg4')


def put(folder, name, content):
    "Write text, or anything else as JSON"
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


# ---- one folder per layout: format, what its splits hold as {video: captions or class} ----

def msrvtt_official(folder):
    put(folder, 'train_val_videodatainfo.json', dict(info={}, videos=[
        dict(video_id='video0', split='train', category=9, url='u'), dict(video_id='video1', split='validate', category=1)], sentences=[
        dict(video_id='video0', caption='a dog runs', sen_id=0), dict(video_id='video1', caption='rain', sen_id=1),
        dict(video_id='video0', caption='it barks', sen_id=2)]))
    put(folder, 'test_videodatainfo.json', dict(videos=[dict(video_id='video2', split='test')], sentences=[dict(video_id='video2', caption='snow')]))
    video(folder, 'TrainValVideo/video0.mp4', 'TrainValVideo/video1.mp4', 'TestVideo/video2.mp4')
    return 'msrvtt', dict(train={'TrainValVideo/video0.mp4': ['a dog runs', 'it barks']}, valid={'TrainValVideo/video1.mp4': ['rain']},
                          test={'TestVideo/video2.mp4': ['snow']})


def msrvtt_frozen(folder):
    put(folder, 'annotation/MSR_VTT.json', dict(annotations=[dict(image_id='video7', caption='one'), dict(image_id='video8', caption='two'),
                                                              dict(image_id='video7', caption='again')]))
    put(folder, 'structured-symlinks/train_list_full.txt', 'video7\n')
    put(folder, 'structured-symlinks/val_list_full.txt', 'video8\n')
    video(folder, 'videos/all/video7.mp4', 'videos/all/video8.mp4')
    return 'msrvtt', dict(train={'videos/all/video7.mp4': ['one', 'again']}, valid={'videos/all/video8.mp4': ['two']}, test={'videos/all/video8.mp4': ['two']})


def coco_style(name, tags, folder):
    for k, tag in enumerate(tags):
        put(folder, f'annotations/caption_{name}_{tag}_cocostyle.json', dict(
            images=[dict(id=k, file_name=f'clip{k}.mp4')], annotations=[dict(id=2*k, image_id=k, caption=f'{tag} caption '), dict(id=2*k + 1, image_id=k, caption='more')]))
        video(folder, f'videos/clip{k}.mp4')
    splits = dict(zip(('train', 'test') if len(tags) == 2 else ('train', 'valid', 'test'), range(3)))
    return name.split('_')[0], {s: {f'videos/clip{k}.mp4': [f'{tags[k]} caption', 'more']} for s, k in splits.items()}


def msvd_text(folder):
    put(folder, 'AllVideoDescriptions.txt', '# MSVD\n\na-b_c_1_9 a man cooks\nx_2_4 a cat\na-b_c_1_9 someone cooks\ny_0_3 last\n')
    put(folder, 'youtube_mapping.txt', 'a-b_c_1_9 vid1\nx_2_4 vid1201\ny_0_3 vid1970\n')
    video(folder, 'YouTubeClips/a-b_c_1_9.avi', 'YouTubeClips/x_2_4.avi', 'YouTubeClips/y_0_3.avi')
    return 'msvd', dict(train={'YouTubeClips/a-b_c_1_9.avi': ['a man cooks', 'someone cooks']}, valid={'YouTubeClips/x_2_4.avi': ['a cat']},
                        test={'YouTubeClips/y_0_3.avi': ['last']})


def msvd_corpus(folder):
    put(folder, 'video_corpus.csv', 'VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n'
        'a,1,9,7,clean,5,English,"a man, cooking"\na,1,9,7,clean,5,German,ein Mann\nb,0,2,7,clean,5,English,rain\n')
    for tag, name in dict(train='a_1_9', val='b_0_2').items(): put(folder, f'{tag}_list.txt', name + '\n')
    video(folder, 'a_1_9.avi', 'b_0_2.avi')
    return 'msvd', dict(train={'a_1_9.avi': ['a man, cooking']}, valid={'b_0_2.avi': ['rain']})


def webvid_csv(folder):
    for tag, n in dict(train=11, val=22).items():
        put(folder, f'results_2M_{tag}.csv', f'videoid,contentUrl,duration,page_dir,name\n{n},http://x,PT00H00M07S,001_050,"waves, ""big"" ones {n}"\n')
        video(folder, f'videos/001_050/{n}.mp4')
    return 'webvid', {s: {f'videos/001_050/{n}.mp4': [f'waves, "big" ones {n}']} for s, n in dict(train=11, valid=22).items()}


def webvid_dict(folder):
    put(folder, 'train_dict.json', {'7': dict(video_path='here/7.mp4', text='a sea'), '8': dict(video_path='here/8.mp4', text=['a hill', 'high'])})
    put(folder, 'valid_dict.json', {'9': dict(video_path='here/9.mp4', text='a fox')})
    video(folder, *(f'here/{n}.mp4' for n in (7, 8, 9)))
    return 'webvid', dict(train={'here/7.mp4': ['a sea'], 'here/8.mp4': ['a hill', 'high']}, valid={'here/9.mp4': ['a fox']})


def kinetics_csv(folder):
    head = 'label,youtube_id,time_start,time_end,split,is_cc\n'
    put(folder, 'kinetics_train.csv', head + 'surfing water,aa,1,11,train,0\n"abseiling, high",bb,20,30,train,0\n')
    put(folder, 'kinetics_val.csv', head + 'surfing water,-c_,0,10,validate,0\n')
    video(folder, 'train/surfing water/aa_000001_000011.mp4', 'train/bb_000020_000030.mp4', 'val/-c__000000_000010.mp4')
    return 'kinetics', dict(train={'train/surfing water/aa_000001_000011.mp4': (1, 'surfing water'), 'train/bb_000020_000030.mp4': (0, 'abseiling, high')},
                            valid={'val/-c__000000_000010.mp4': (1, 'surfing water')})


def kinetics_database(folder):
    put(folder, 'kinetics_700.json', dict(database={'v1': dict(subset='training', annotations=dict(label='riding_a_bike')),
                                                   'v2': dict(subset='validation', annotations=dict(label='yoga'))}))
    put(folder, 'category_mapping.txt', 'yoga\t0\nriding a bike\t5\n')
    video(folder, 'training/riding_a_bike/v1.mp4', 'validation/yoga/v2.mp4')
    return 'kinetics', dict(train={'training/riding_a_bike/v1.mp4': (5, 'riding a bike')}, valid={'validation/yoga/v2.mp4': (0, 'yoga')})


def mlslt(folder):
    signs = [dict(lang='de', text='Guten Tag'), dict(lang='en', text='Good day'), dict(lang='fr', text='Bonjour')]
    put(folder, 'train.json', [dict(id=4, sign_list=signs)])
    put(folder, 'dev.json', [dict(id='k9', sign_list=signs[1:2])])
    video(folder, 'train/4/de.mp4', 'train/4/en.mp4', 'dev/k9/en.mp4')
    return 'mlslt', dict(train={'train/4/de.mp4': ['Good day'], 'train/4/en.mp4': ['Good day']}, valid={'dev/k9/en.mp4': ['Good day']})


LAYOUTS = dict(msrvtt_official=msrvtt_official, msrvtt_frozen=msrvtt_frozen, msrvtt_coco=partial(coco_style, 'msrvtt_1k', ('trainval', 'test')),
               msvd_text=msvd_text, msvd_corpus=msvd_corpus, msvd_coco=partial(coco_style, 'msvd', ('train', 'val', 'test')), webvid_csv=webvid_csv,
               webvid_dict=webvid_dict, kinetics_csv=kinetics_csv, kinetics_database=kinetics_database, mlslt=mlslt)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout(tmp_path, layout):
    name, splits = LAYOUTS[layout](tmp_path)
    for split, wanted in splits.items():
        records = list(read_records(tmp_path, name, split))
        if name == 'kinetics': found = {r['video']: (r['label'], r['class_name']) for r in records}
        else:
            found = {r['video']: r['captions'] for r in records}
            assert all(r['caption'] == r['captions'][0] and r['video_id'] for r in records)
        assert found == wanted
        assert all(str(tmp_path) in r['source'] for r in records)
        batch = read_dataset(tmp_path, name, split, size=24).batch(range(len(records)))
        assert batch['video'].shape == (len(records), 8, 3, 24, 24) and batch['video'].dtype == torch.uint8
    report = check_dataset(tmp_path, name)
    assert report['records'] == sum(map(len, splits.values())) and report['broken'] == 0
    absent = {'train', 'valid', 'test'} - set(splits)
    for split in absent:
        with pytest.raises(ValueError): read_dataset(tmp_path, name, split)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_missing_video_is_skipped_and_counted(tmp_path, layout):
    name, splits = LAYOUTS[layout](tmp_path)
    gone = next(iter(splits['train']))
    (tmp_path/gone).unlink()
    with pytest.raises(ValueError, match='has no video') as error: read_dataset(tmp_path, name)
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    if len(splits['train']) > 1:
        data = read_dataset(tmp_path, name, on_error='skip')
        assert len(data) == len(splits['train']) - 1 and data.problems.count == 1 and 'has no video' in data.problems.first[0]
    else:
        with pytest.raises(ValueError, match='1 are broken'): read_dataset(tmp_path, name, on_error='skip')


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('harm', ['', '{"database": {"x": 7}, "videos": [1], "sentences": [3], "images": [{}], "annotations": [{}]}', '[{"id": []}, 5, {"id": 1}]',
                                  '{"a": ', 'label\n1,2,3\n', '\udcff\udcfe', 'x\n' + '"'*3])
def test_harmed_files_get_a_sentence(tmp_path, layout, harm):
    name, splits = LAYOUTS[layout](tmp_path)
    for file in [p for p in tmp_path.rglob('*') if p.suffix in ('.json', '.csv', '.txt')]:
        whole = file.read_bytes()
        file.write_bytes(harm.encode('utf-8', 'surrogateescape'))
        for on_error in ('raise', 'skip'):
            try: read_dataset(tmp_path, name, on_error=on_error)
            except ValueError as error: assert str(tmp_path) in str(error) and '\n' not in str(error)
        file.write_bytes(whole)


@pytest.mark.parametrize('path', ['/etc/passwd', '../out.mp4', 'a/../../out.mp4', 'C:\\x.mp4', 'link.mp4', '', 7, None, 'no\0pe'])
def test_paths_stay_inside(tmp_path, path):
    home = tmp_path/'home'
    put(home, 'train_dict.json', {'1': dict(video_path=path, text='a sea')})
    video(tmp_path, 'out.mp4')
    (home/'link.mp4').symlink_to(tmp_path/'out.mp4')
    with pytest.raises(ValueError, match="train_dict.json, entry '1'"): read_dataset(home, 'webvid')


def test_names_that_lead_out(tmp_path):
    kinetics_database(tmp_path)
    put(tmp_path, 'kinetics_700.json', dict(database={'../../x': dict(subset='training', annotations=dict(label='yoga'))}))
    with pytest.raises(ValueError, match='leads out'): read_dataset(tmp_path, 'kinetics')
    put(tmp_path, 'kinetics_700.json', dict(database={'v1': dict(subset='training', annotations=dict(label='flying'))}))
    with pytest.raises(ValueError, match="'flying' is none of the 2 classes"): read_dataset(tmp_path, 'kinetics')


def test_duplicates(tmp_path):
    msrvtt_official(tmp_path/'a')
    found = json.loads((tmp_path/'a'/'test_videodatainfo.json').read_text())
    put(tmp_path/'a', 'test_videodatainfo.json', found | dict(videos=found['videos']*2))
    with pytest.raises(ValueError, match='video 1: video2 has no caption, or occurs twice'): read_dataset(tmp_path/'a', 'msrvtt', 'test')
    assert len(read_dataset(tmp_path/'a', 'msrvtt', 'test', on_error='skip')) == 1
    mlslt(tmp_path/'b')
    put(tmp_path/'b', 'train.json', json.loads((tmp_path/'b'/'train.json').read_text())*2)
    with pytest.raises(ValueError, match='entry 1: id 4 occurs twice'): read_dataset(tmp_path/'b', 'mlslt')
    webvid_csv(tmp_path/'c')
    text = (tmp_path/'c'/'results_2M_train.csv').read_text()
    put(tmp_path/'c', 'results_2M_train.csv', text + text.splitlines()[1] + '\n')
    with pytest.raises(ValueError, match="line 3: id '11' occurs twice"): read_dataset(tmp_path/'c', 'webvid')


def test_a_broken_video_is_named_by_its_record(tmp_path):
    name, _ = webvid_dict(tmp_path)
    (tmp_path/'here/8.mp4').write_bytes((tmp_path/'here/8.mp4').read_bytes()[:300])
    data = read_dataset(tmp_path, name, size=16)
    assert data[0]['video'].shape == (8, 3, 16, 16)
    with pytest.raises(ValueError, match=r"entry '8': here/8.mp4 is damaged"): data[1]
    report = check_dataset(tmp_path, name)
    assert report['records'] == 2 and report['broken'] == 1


def test_languages_are_chosen(tmp_path):
    mlslt(tmp_path)
    assert [r['language'] for r in read_records(tmp_path, 'mlslt', languages=('en',))] == ['en']


def test_the_official_split_of_msvd():
    sizes = {s: last - first + 1 for s, (first, last) in MSVD_SPLIT.items()}
    assert sizes == dict(train=1200, valid=100, test=670) and len(FORMATS) == 5


def test_unknown_split(tmp_path):
    webvid_csv(tmp_path)
    with pytest.raises(ValueError, match="webvid has no split 'test'"): read_dataset(tmp_path, 'webvid', 'test')
