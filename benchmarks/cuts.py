"""Shot detection: what is found in films cut together from real footage, and frames per CPU second at 720p.

Ours, with and without the network (TransNet V2), against PySceneDetect's detectors where that is installed. A hard cut
counts where it is found at its very frame; speed includes decoding.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import cuts_set
import footage

from data_tools import shots, transnet
from data_tools.shots import Transition
from sora_lite.data.video import read_frames

Detect = Callable[[Path], list[Transition]]
CUTS, DISSOLVES, FADES, SEED = 60, 20, 10, 100


def detectors() -> dict[str, Detect]:
    """Name -> what finds the transitions of a file."""
    found: dict[str, Detect] = {}
    if find_spec("scenedetect"):
        from scenedetect import AdaptiveDetector, ContentDetector, detect

        def of_scenes(path: Path, detector: type) -> list[Transition]:
            starts = [start.frame_num for start, _ in detect(str(path), detector(min_scene_len=5))[1:]]
            return [Transition("cut", start, start) for start in starts]

        found["PySceneDetect, ContentDetector"] = lambda path: of_scenes(path, ContentDetector)
        found["PySceneDetect, AdaptiveDetector"] = lambda path: of_scenes(path, AdaptiveDetector)
    model = transnet.load(footage.transnet_weights())
    found["sora_lite, detector=luma"] = lambda path: shots.find_transitions(
        frame for _, frame in read_frames(path, size=shots.SIZE, draft=True)
    )
    found["sora_lite, detector=transnet"] = lambda path: transnet.find_transitions(
        (frame for _, frame in read_frames(path, size=transnet.SIZE, draft=True)), model
    )
    return found


def frames_per_second(detect: Detect, path: Path, frames: int) -> float:
    """Of CPU time, the better of two runs after a first."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        detect(path)
        seconds.append(time.process_time() - start)
    return frames / min(seconds[1:])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    try:
        clips, candidates = footage.clips(), detectors()
    except pytest.skip.Exception as reason:
        print(f"cuts: {reason}")
        return
    hd = next(path for path in clips if path.name == "bigbuckbunny.mp4")
    count = sum(1 for _ in read_frames(hd, size=shots.SIZE, draft=True))
    with tempfile.TemporaryDirectory() as folder:
        films = []
        for film in cuts_set.films(clips, cuts=CUTS, dissolves=DISSOLVES, fades=FADES, seed=SEED):
            films.append((Path(folder) / f"{len(films)}.mp4", film.labels))
            films[-1][0].write_bytes(film.mp4())
        print(f"{CUTS} cuts, {DISSOLVES} dissolves, {FADES} fades in {len(films)} films; frames of 720p per CPU second")
        print(f"  {'':<34}{'cuts':>8}{'dissolves':>11}{'fades':>8}{'precision':>11}{'frames/s':>10}")
        for name, detect in candidates.items():
            score = cuts_set.Score()
            for path, labels in films:
                score.add(labels, detect(path))
            recalls = [score.recall(kind) for kind in ("cut", "dissolve", "fade")]
            speed = frames_per_second(detect, hd, count)
            row = f"{recalls[0]:>8.3f}{recalls[1]:>11.3f}{recalls[2]:>8.3f}{score.precision:>11.3f}{speed:>10.0f}"
            print(f"  {name:<34}{row}")
    if not find_spec("scenedetect"):
        print("PySceneDetect is not installed: pip install scenedetect-headless")


if __name__ == "__main__":
    main()
