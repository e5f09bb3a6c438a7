"How Perceiver-VL's fixtures are built from their own config.json."
import re
import torch
from vl_tutor.data.transforms import EVALUATE, perceiver_video
from vl_tutor.data.videos import uniform_frames
from parity_golden import checker


def atol(fixture: str):
    "Whole numbers exactly; pixels far below the config's own remark on PIL versions, 2/255"
    return lambda name: 0. if 'indices' in name else 1e-6


def rtol(fixture: str): return lambda name: 0.


@checker('perceiver_vl/preprocess')
def preprocess(config, weights, io):
    sizes, picture, clip = config['config'], io['in.image_uint8'].numpy(), io['in.video_uint8']
    side, frames = sizes['image_size'], sizes['max_frames']
    chosen = torch.as_tensor(uniform_frames(len(clip), frames))
    assert len(clip) == sizes['decoded_frames']
    lost = io['out.video_unreadable'].shape
    out = {'out.resized_keep_ratio': EVALUATE['perceiver_vl'](picture, side), 'out.resized_square': EVALUATE['perceiver_vl_square'](picture, side),
           'out.frame_indices': chosen, 'out.video': perceiver_video(clip[chosen].permute(0, 3, 1, 2)),
           'out.video_unreadable': perceiver_video(None, lost[0], lost[-1])}
    for name in (k for k in io if 'uniform_indices_len' in k):
        out[name] = torch.as_tensor(uniform_frames(int(re.search(r'\d+$', name)[0]), frames))
    return out
