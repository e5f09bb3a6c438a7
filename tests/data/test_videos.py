"Videos: which frames, limits before decoding, and every odd file either opens right or gets one sentence with its name."
import json
import struct
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from video_files import solid, write_video
from vl_tutor.data import videos
from vl_tutor.data.videos import (Limits, VideoFrames, evaluation_frames, perceiver_frames, read_video, training_frames, training_starts,
                                  uniform_frames, video_info)
from vl_tutor.world.action import CLIP_LEVELS, film, project
from vl_tutor.world.dice import mix

golden = Path(__file__).resolve().parents[1]/'golden'
CONTAINERS = [('a.mp4', 'libx264'), ('b.mp4', 'mpeg4'), ('a.webm', 'libvpx'), ('b.webm', 'libvpx-vp9'), ('a.mkv', 'ffv1'), ('a.avi', 'mpeg4')]


def greys(clip): return clip[:, 1, -4, -4].tolist()


# ---- which frames ----

def test_perceiver_fixture():
    folder = golden/'perceiver_vl'/'preprocess'
    config, io = json.loads((folder/'config.json').read_text())['config'], load_file(folder/'io.safetensors')
    lengths = {name: int(name.rpartition('len')[2]) for name in io if name.startswith('out.uniform_indices_len')}
    lengths['out.frame_indices'] = config['decoded_frames']
    for name, n in lengths.items(): assert uniform_frames(n, config['max_frames']).tolist() == io[name].tolist(), name
    assert len(lengths) >= 3


def test_uni_perceiver_fixture():
    extra = json.loads((golden/'uni_perceiver'/'preprocess'/'config.json').read_text())['extra']
    for c in extra['video_eval_indices']:
        found = evaluation_frames(c['total_frames'], c['fps'], frames=c['frames'], stride=c['stride'], clips=c['clips'],
                                  target_fps=c['target_fps'])
        assert found.tolist() == c['indices']
    for c in extra['video_train_indices']:
        found = training_frames(c['total_frames'], c['rate'], frames=c['frames'], offset=c['offset_draw'])
        assert found.tolist() == c['indices']


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 2**30))
def test_perceiver_frames_exist(n, t, seed):
    found = perceiver_frames(n, t, generator=torch.Generator().manual_seed(seed)).tolist()
    assert len(found) == t and min(found) >= 0 and max(found) < n
    if n >= t: assert len(set(found)) == t
    else: assert found == [int(k*n/t + 1e-9) for k in range(t)]


def test_half_of_the_choices_are_random_and_disordered():
    g = torch.Generator().manual_seed(0)
    even = sum(perceiver_frames(50, 8, generator=g).tolist() == uniform_frames(50, 8).tolist() for _ in range(2000))
    assert .46 < even/2000 < .54
    assert all(perceiver_frames(50, 8, generator=g, random=0.).tolist() == uniform_frames(50, 8).tolist() for _ in range(20))
    taken = torch.stack([perceiver_frames(10, 3, generator=g, random=1.) for _ in range(3000)])
    assert (taken[:, 0] > taken[:, 1]).float().mean().sub(.5).abs() < .04
    assert torch.bincount(taken.flatten(), minlength=10).sub(900).abs().max() < 120


@given(st.integers(1, 2000), st.floats(1, 120), st.integers(1, 32), st.integers(1, 64), st.integers(1, 5))
def test_evaluation_frames_exist(total, fps, frames, stride, clips):
    found = evaluation_frames(total, fps, frames=frames, stride=stride, clips=clips)
    assert found.shape == (clips, frames) and found.min() >= 0 and found.max() < total


@given(st.integers(1, 2000), st.floats(1, 99), st.integers(1, 32))
def test_training_frames_fit_if_they_can(total, rate, frames):
    starts = training_starts(total, rate, frames)
    for offset in {0, max(0, starts - 1)}:
        found = training_frames(total, rate, frames=frames, offset=offset).tolist()
        assert len(found) == frames and min(found) >= 0 and max(found) < total
        if starts: assert found == sorted(found) and found[0] == offset
    assert training_starts(total, rate, frames, whole=True) <= starts


@pytest.mark.parametrize('call', [lambda: uniform_frames(0, 4), lambda: uniform_frames(4, 0), lambda: evaluation_frames(0, 30.), lambda: training_frames(0, 2.)])
def test_no_frames_no_choice(call):
    with pytest.raises(ValueError, match='cannot take'): call()


# ---- files ----

@pytest.mark.parametrize('name, codec', CONTAINERS)
def test_every_container(tmp_path, name, codec):
    write_video(tmp_path/name, solid(range(0, 200, 20), 64, 48), codec=codec)
    info, clip = video_info(tmp_path/name), read_video(tmp_path/name)
    assert (info.width, info.height, info.frames, round(info.fps)) == (64, 48, 10, 10)
    assert clip.shape == (10, 3, 48, 64) and clip.dtype == torch.uint8
    assert np.abs(np.subtract(greys(clip), range(0, 200, 20))).max() <= 4
    assert (clip[:, 0, 2, 2] > 200).all()                                                   # the red corner is at the top left
    again = read_video((tmp_path/name).read_bytes(), lambda i: [7, 2, 2])
    assert np.abs(np.subtract(greys(again), [140, 40, 40])).max() <= 4                      # in the order asked for, repeated too


@pytest.mark.parametrize('name, codec', CONTAINERS)
def test_cut_off_files(tmp_path, name, codec):
    data = write_video(tmp_path/name, solid(range(10), 64, 48), codec=codec).read_bytes()
    for keep in (0, 3, 8, 40, len(data)//3, len(data)//2, len(data) - 9):
        with pytest.raises(ValueError, match='cut.vid') as error: read_video(data[:keep], name='cut.vid')
        assert '\n' not in str(error.value) and len(str(error.value)) < 200


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_flipped_bytes_open_or_get_a_sentence(tmp_path_factory, data):
    name, codec = data.draw(st.sampled_from(CONTAINERS))
    place = tmp_path_factory.getbasetemp()/f'flip_{name}'
    whole = bytearray(place.read_bytes() if place.exists() else write_video(place, solid(range(5), 32, 32), codec=codec).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))): whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try: clip = read_video(bytes(whole), name='x.vid', limits=Limits(pixels=500_000, frames=1000))
    except ValueError as error: assert 'x.vid' in str(error) and '\n' not in str(error)
    else: assert clip.dtype == torch.uint8


def test_variable_frame_rate(tmp_path):
    times = [0, 100, 150, 900, 1000, 1010, 2000, 2100, 2200, 4000]
    file = write_video(tmp_path/'v.mp4', solid(range(0, 200, 20), 64, 48), times=times)
    info = video_info(file)
    assert np.allclose(info.times, np.array(times)/1000, atol=.002)
    nearest = lambda i: [min(range(i.frames), key=lambda k: abs(i.times[k] - t)) for t in (0, 1, 2, 4)]
    assert np.abs(np.subtract(greys(read_video(file, nearest)), [0, 80, 120, 180])).max() <= 4


@pytest.mark.parametrize('matrix, shape, corner', [((0, 1, -1, 0), (64, 48), (2, -3)), ((-1, 0, 0, -1), (48, 64), (-3, -3)), ((0, -1, 1, 0), (64, 48), (-3, 2))])
def test_turned_as_a_phone_was_held(tmp_path, matrix, shape, corner):
    data = bytearray(write_video(tmp_path/'r.mp4', solid(range(3), 64, 48)).read_bytes())
    a, b, c, d = (x << 16 for x in matrix)
    at = data.find(b'tkhd') + 44
    data[at:at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip = read_video(bytes(data))
    assert clip.shape[2:] == shape
    assert clip[0, 0, corner[0], corner[1]] > 200                                           # where the red corner is now


def test_sound_only_empty_and_strange(tmp_path):
    av = videos.pyav()
    with av.open(str(tmp_path/'sound.mp4'), 'w') as out:
        stream = out.add_stream('aac', rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]: out.mux(packet)
    (tmp_path/'empty.mp4').write_bytes(b'')
    (tmp_path/'poem.mp4').write_text('I am a poem, and longer than a head.')
    (tmp_path/'list.m3u8').write_text('#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n')
    (tmp_path/'folder.mp4').mkdir()
    for name, says in {'sound.mp4': 'holds no video, only sound', 'empty.mp4': 'is empty', 'poem.mp4': 'is not an MP4', 'list.m3u8': 'is not an MP4',
                       'folder.mp4': 'is a folder', 'nowhere.mp4': 'does not exist'}.items():
        with pytest.raises(ValueError, match=says) as error: read_video(tmp_path/name)
        assert str(tmp_path/name) in str(error.value)
    with pytest.raises(ValueError, match='path or bytes'): read_video(7)


def test_no_frames(tmp_path):
    data = bytearray(write_video(tmp_path/'one.mkv', solid([9], 32, 32), codec='ffv1').read_bytes())
    block = data.index(b'\xa3', data.index(b'\x1f\x43\xb6\x75') + 4)
    data[block] = 0xec                                                                      # the only block becomes a filler
    with pytest.raises(ValueError, match='none.mkv (holds no frame|is damaged)'): read_video(bytes(data), name='none.mkv')
    av = videos.pyav()
    with av.open(str(tmp_path/'one.mkv')) as source, av.open(str(tmp_path/'none.mp4'), 'w') as out:
        out.add_stream('mpeg4', rate=5)
        out.start_encoding()
    with pytest.raises(ValueError, match='none.mp4 holds no'): read_video(tmp_path/'none.mp4')


def test_limits_come_before_decoding(tmp_path, monkeypatch):
    file = write_video(tmp_path/'a.mp4', solid(range(30), 64, 48))
    monkeypatch.setattr(videos, 'decode', None)                                             # nothing may be decoded
    for limits, says in ((Limits(pixels=3000), '64×48 pixels'), (Limits(frames=29), '29 frames'), (Limits(seconds=2.), '2 seconds'),
                         (Limits(memory=100_000), 'take fewer')):
        with pytest.raises(ValueError, match=says): read_video(file, limits=limits)
    with pytest.raises(ValueError, match='numbered from 0'): read_video(file, lambda i: [30])
    with pytest.raises(ValueError, match='numbered from 0'): read_video(file, lambda i: [])


def test_a_film_with_a_lying_head(tmp_path):
    "WebM says no number of frames: they are counted"
    file = write_video(tmp_path/'a.webm', solid(range(30), 64, 48), codec='libvpx')
    with pytest.raises(ValueError, match='20 frames'): video_info(file, limits=Limits(frames=20))


def test_chunks_that_lead_nowhere():
    for kind in ('mp4', 'matroska', 'avi'):
        for junk in (bytes(400_000), b'\xff'*64, b'\x00\x00\x00\x08free'*50_000): assert videos.said_length(videos.io.BytesIO(junk), kind, len(junk)) >= 0


def test_without_pyav(monkeypatch, tmp_path):
    file = write_video(tmp_path/'a.mp4', solid(range(3), 64, 48))
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ValueError, match=r"pip install 'vl-tutor\[video\]'"): read_video(file)


# ---- clips ----

def test_the_same_kind_of_clip_as_the_world(tmp_path):
    clips, _, _ = film(mix(torch.arange(2)), CLIP_LEVELS['pair'])
    real = project(clips, 48)
    for i, clip in enumerate(real):
        write_video(tmp_path/f'{i}.mkv', clip.permute(0, 2, 3, 1).numpy(), codec='ffv1', pix_fmt='bgr0')
        again = VideoFrames(8, 48)(tmp_path/f'{i}.mkv')
        assert again.shape == clip.shape and again.dtype == clip.dtype
        assert (again == clip).all()                                                        # lossless there and back
    assert VideoFrames(None)(tmp_path/'0.mkv').shape == (8, 3, 48, 48)
    assert VideoFrames(3, 20)(tmp_path/'0.mkv').shape == (3, 3, 20, 20)
    assert VideoFrames(4, picture=lambda p: torch.tensor(p.size))(tmp_path/'0.mkv').tolist() == [[48, 48]]*4
    eval_rule = VideoFrames(choose=lambda i: evaluation_frames(i.frames, i.fps, frames=2, stride=3, target_fps=i.fps)[0])
    assert (eval_rule(tmp_path/'0.mkv') == real[0][[0, 3]]).all()
