"Small videos for the tests, written with PyAV."
from fractions import Fraction
import numpy as np


def solid(greys, width, height):
    "Grey frames with a red corner at the top left"
    frames = np.stack([np.full((height, width, 3), g, np.uint8) for g in greys])
    frames[:, :16, :16] = 255, 0, 0
    return frames


def write_video(file, frames, *, codec='libx264', rate=10, times=None, pix_fmt='yuv420p'):
    "Write frames `(t h w 3)`, or at the given times in milliseconds; returns the path"
    import av
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), 'w') as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times: stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), 'rgb24')
            if times: frame.pts, frame.time_base = times[k], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file
