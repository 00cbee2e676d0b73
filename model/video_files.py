"""Videos as files: H.264 in MP4 at their true size, and a contact sheet of several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image
    import PIL.ImageFont

MARGIN, GAP, LETTERS = 8, 2, 14
"""Of a contact sheet, in pixels: around everything, between frames, and the height of the letters."""
MOST_LINES = 3
"""Of text below a row of a contact sheet."""
LEAST_FPS, MOST_FPS = 0.1, 1000
"""Frames per second that players cope with."""


def check_fps(fps: float) -> None:
    """Whether a file can have that many frames per second.

    Raises:
        ValueError: it cannot; the message has the range.
    """
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise ValueError(f"fps is {fps}; it has to lie between {LEAST_FPS} and {MOST_FPS} frames per second")


def to_pixels(frames: NDArray[np.floating[Any]], name: str) -> NDArray[np.uint8]:
    """Frames of 0 to 1 as they are written, uint8 of the same shape.

    Raises:
        FloatingPointError: they hold values that are no numbers; `name` says whose.
    """
    if not np.isfinite(frames).all():
        raise FloatingPointError(
            f"{name} holds values that are no numbers; a smaller --guidance-scale or another number format (--dtype bf16 or fp32) may help"
        )
    pixels: NDArray[np.uint8] = (frames * 255).round().astype(np.uint8)
    return pixels


def write_video(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Write an MP4 file (H.264, 4:2:0). The file appears whole or not at all.

    The picture has the size of the frames, whether or not that is a multiple of the 16 pixels of a macro block.

    Args:
        path: of the file.
        frames: RGB, (F, H, W, 3).
        fps: frames per second, 0.1 to 1000.

    Raises:
        ValueError: not such an array, an odd height or width, or `fps` is out of range.
    """
    from fractions import Fraction

    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} of the shape {frames.shape}; uint8 of (frames, height, width, 3) is wanted")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames have {width} x {height} pixels; H.264 with 4:2:0 chroma needs an even width and height")
    check_fps(fps)
    unfinished = path.with_name(path.name + ".part")
    try:
        with av.open(str(unfinished), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # Nearly lossless: the samples of a model are looked at, and measured, more than they are stored.
            stream.options = {"crf": "12", "preset": "medium"}
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def evenly_spaced(frames: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """`count` of the frames (or all, if there are fewer) from the first to the last, (at most `count`, H, W, 3)."""
    places = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    chosen: NDArray[np.uint8] = frames[places]
    return chosen


def contact_sheet(rows: Iterable[tuple[str, Any]]) -> PIL.Image.Image:
    """A picture with a row of frames for each video and its text below; frames may differ in size and number from row to row.

    Of a text that is longer than `MOST_LINES` lines the beginning is shown.

    Args:
        rows: text and frames, RGB, of each video (see `evenly_spaced`): an array of uint8, (F, H, W, 3), a tensor as the shards'
            reader makes it, (F, 3, H, W), or the pipeline's list of pictures.

    Raises:
        ValueError: there is no row, or frames are no such array.
    """
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    rows = [(text, _pixels(frames)) for text, frames in rows]
    if not rows:
        raise ValueError("a contact sheet of no videos was asked for; give at least one")
    font = PIL.ImageFont.load_default(LETTERS)
    widest = max(len(frames) * (frames.shape[2] + GAP) - GAP for _, frames in rows)
    widest = max(widest, 320)
    texts = [_wrapped(text, widest, font) for text, _ in rows]
    line = math.ceil(LETTERS * 1.3)
    heights = [frames.shape[1] + len(lines) * line + 2 * MARGIN for (_, frames), lines in zip(rows, texts, strict=True)]
    sheet = PIL.Image.new("RGB", (widest + 2 * MARGIN, sum(heights) + MARGIN), (255, 255, 255))
    draw = PIL.ImageDraw.Draw(sheet)
    top = MARGIN
    for (_, frames), lines, height in zip(rows, texts, heights, strict=True):
        for number, frame in enumerate(frames):
            sheet.paste(PIL.Image.fromarray(frame), (MARGIN + number * (frame.shape[1] + GAP), top))
        below = top + frames.shape[1] + MARGIN // 2
        for number, text in enumerate(lines):
            draw.text((MARGIN, below + number * line), text, fill=(32, 32, 32), font=font)
        top += height
    return sheet


def _pixels(frames: Any) -> NDArray[np.uint8]:
    """Frames to look at, whatever holds them, as uint8 (F, H, W, 3)."""
    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[3]):
        raise ValueError(
            f"frames are {pixels.dtype} of the shape {pixels.shape}; uint8 of (frames, height, width, 3) or (frames, 3, height, width) "
            "is wanted"
        )
    return pixels if pixels.shape[3] == 3 else pixels.transpose(0, 2, 3, 1)


def _wrapped(text: str, width: int, font: PIL.ImageFont.ImageFont | PIL.ImageFont.FreeTypeFont) -> list[str]:
    """The first `MOST_LINES` lines of `text`, of at most `width` pixels; a word that is too long for a line is cut."""
    lines = [""]
    for word in text.split():
        if len(lines) > MOST_LINES:
            break
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append(word)
        while font.getlength(lines[-1]) > width:
            fitting = max(1, int(len(lines[-1]) * width / font.getlength(lines[-1])))
            lines[-1:] = [lines[-1][:fitting], lines[-1][fitting:]]
    lines = [line for line in lines if line]
    if len(lines) > MOST_LINES:
        last = lines[MOST_LINES - 1]
        while font.getlength(last + "…") > width:
            last = last[:-1]
        lines[MOST_LINES - 1 :] = [last.rstrip() + "…"]
    return lines
