"""Videos with sound, made for tests."""
from fractions import Fraction

import av
import numpy as np


def grey(level, height=48, width=64):
    return np.full((height, width, 3), level, np.uint8)


def with_sound(path, codec, seconds=1., rate=8000):
    """A video of 10 frames with a tone, in the container that the suffix says."""
    with av.open(str(path), 'w') as container:
        video = container.add_stream('mpeg4', rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, 'yuv420p'
        sound = container.add_stream(codec, rate=rate, layout='mono')
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey(90), 'rgb24')))
        container.mux(video.encode())
        tone = (8000 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], 's16', 'mono')
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def sound_alone(path):
    """A second of silence, and no picture, in the container that the suffix says."""
    with av.open(str(path), 'w') as container:
        sound = container.add_stream('aac', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), 's16', 'mono')
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def packets(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.audio[0]) if packet.size]
