"""Files that look like videos and are none, for the tests of whoever has to refuse them."""

import io

import av
import numpy as np


def audio_only() -> bytes:
    """An mp4 with a sound track and nothing to see."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream = muxer.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    return out.getvalue()
