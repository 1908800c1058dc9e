"""Frames out of video files and into them. PyAV only; nothing here knows about tensors.

Shapes: T frames, H height, W width; frames are uint8 RGB (T, H, W, 3) in [0, 255], upright (rotation applied).
`pts` is a frame's presentation time in ticks of `time_base` seconds. Frames are numbered from 0 in order of
presentation, counting those that can be decoded.

Files may come from anywhere: see `opening` for what is never done with them.
"""

from sora_lite.data.video.cutting import cut_clips
from sora_lite.data.video.decoding import decode_clip, decode_planes, read_frames
from sora_lite.data.video.encoding import encode_mp4, encode_png, write_mp4
from sora_lite.data.video.facts import (
    GOP,
    STILLS,
    BadVideo,
    Box,
    Limits,
    Planes,
    Source,
    VideoFacts,
    rational,
    shown_size,
)
from sora_lite.data.video.opening import sniff
from sora_lite.data.video.probing import probe

__all__ = [
    "GOP",
    "STILLS",
    "BadVideo",
    "Box",
    "Limits",
    "Planes",
    "Source",
    "VideoFacts",
    "cut_clips",
    "decode_clip",
    "decode_planes",
    "encode_mp4",
    "encode_png",
    "probe",
    "rational",
    "read_frames",
    "shown_size",
    "sniff",
    "write_mp4",
]
