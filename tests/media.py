"""Videos for tests whose frames say in their pixels which frame they are, and the four readers that everybody uses.

A frame carries its number as a row of twelve black and white blocks with the complement of every block below it, so that a
frame that is damaged, blended or not ours cannot be misread: it raises. The blocks survive lossy codecs and scaling to a
quarter. Below them something moves, so that encoders produce the predicted frames that real footage has.
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

BITS = 12
BAND = 0.5
"""Share of the picture's height that the two rows of blocks take."""


def paint(number: int, width: int = 320, height: int = 180, scene: int = 0) -> Image:
    """Frame `number` (0 to 4095) as RGB, shape (height, width, 3); `scene` decides how the moving part below looks."""
    if not 0 <= number < 2**BITS:
        raise ValueError(f"frame number {number} does not fit {BITS} bits")
    image = np.empty((height, width, 3), np.uint8)
    bits = np.array([(number >> bit) & 1 for bit in range(BITS)])
    columns = bits[np.arange(width) * BITS // width] * 200 + 28
    row = round(height * BAND / 2)
    image[:row] = columns[None, :, None]
    image[row : 2 * row] = 256 - columns[None, :, None]
    y, x = np.mgrid[0 : height - 2 * row, 0:width]
    wave = np.sin((x + 3 * number) * (0.05 + 0.03 * (scene % 3))) + np.cos((y - number) * 0.09 + scene)
    colour = np.array([(90, 60, 30), (20, 70, 60), (60, 20, 80)][scene % 3])
    image[2 * row :] = np.clip(110 + (scene * 67) % 80 + wave[..., None] * colour / 2, 0, 255).astype(np.uint8)
    return image


def read_number(image: Image) -> int:
    """The number painted into `image`, shape (height, width, 3) or (height, width), upright.

    Raises:
        ValueError: the two rows of blocks do not complement each other.
    """
    grey = image.astype(np.float64)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    height, width = grey.shape
    row = height * BAND / 2
    # Only the heart of each block counts: edges are blurred by codecs and scalers.
    columns = [slice(int((bit + 0.3) * width / BITS), int((bit + 0.7) * width / BITS) + 1) for bit in range(BITS)]
    upper = np.array([grey[int(row * 0.3) : int(row * 0.7) + 1, column].mean() for column in columns])
    lower = np.array([grey[int(row * 1.3) : int(row * 1.7) + 1, column].mean() for column in columns])
    if np.abs(upper - lower).min() < 60:
        raise ValueError(f"no readable frame number: blocks {upper.round().tolist()} above {lower.round().tolist()}")
    return int(sum(1 << bit for bit in range(BITS) if upper[bit] > lower[bit]))


def write_video(
    path: Path,
    times: Sequence[Fraction | float],
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (320, 180),
    scene_of: Callable[[int], int] = lambda number: 0,
    rotation: int = 0,
    time_base: Fraction = Fraction(1, 90000),
    rate: Fraction = Fraction(25),
    tone: bool = False,
    container_options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write a video in which frame `n`, showing the number `n`, has the timestamp `times[n]` in seconds.

    Args:
        path: target; its suffix decides the container.
        times: increasing timestamps, one per frame.
        codec, options: the video encoder and its options.
        size: (width, height) as displayed, before `rotation`.
        scene_of: the scene of each frame number; a change makes encoders place a key frame of their own accord.
        rotation: 0, 90, 180 or 270: store the pixels turned by so many degrees and the display matrix that undoes it (MP4 only).
        time_base: unit of the encoder's timestamps.
        rate: nominal frame rate, written into the header.
        tone: add a sound track as long as the video.
        container_options: options of the muxer.
        pixel_format: pixel format of the encoder.
    """
    width, height = size if rotation % 180 == 0 else size[::-1]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = time_base
        sound = container.add_stream("aac", rate=48000) if tone else None
        for number, time in enumerate(times):
            pixels = np.ascontiguousarray(np.rot90(paint(number, *size, scene_of(number)), k=rotation // 90))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(Fraction(time) / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            container.mux(packet for packet in _tone(sound, float(times[0]), float(times[-1])))
    if rotation:
        set_display_rotation(path, rotation)
    return path


def _tone(stream: av.AudioStream, start: float, end: float) -> Iterable[av.Packet]:
    """A 440 Hz tone from `start` to `end` seconds."""
    for first in range(int(start * 48000), int(end * 48000), 1024):
        wave = np.sin(np.arange(first, first + 1024) * (2 * np.pi * 440 / 48000)).astype(np.float32) * 0.3
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, first, Fraction(1, 48000)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def set_display_rotation(path: Path, degrees: int) -> None:
    """Write the matrix that turns the picture clockwise by `degrees` into the first track header of the MP4 at `path`.

    The matrix stands in the last 44 bytes of the `tkhd` box before width and height (ISO/IEC 14496-12, 8.3.2).
    """
    data = bytearray(path.read_bytes())
    box = data.index(b"tkhd") - 4
    size = int.from_bytes(data[box : box + 4], "big")
    one = 1 << 16
    a, b, c, d = {0: (one, 0, 0, one), 90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[box + size - 44 : box + size - 8] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)


def read_pyav(video: bytes) -> list[Image]:
    """Every frame that PyAV delivers, upright, shape (height, width, 3)."""
    images = []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            images.append(np.ascontiguousarray(np.rot90(image, k=frame.rotation // 90)))
    return images


def read_opencv(video: bytes, folder: Path) -> list[Image]:
    """Every frame that `cv2.VideoCapture` delivers."""
    import cv2

    path = folder / "opencv.mp4"
    path.write_bytes(video)
    capture, images = cv2.VideoCapture(str(path)), []
    while True:
        delivered, image = capture.read()
        if not delivered:
            capture.release()
            return images
        images.append(np.asarray(image, np.uint8))


def read_torchcodec(video: bytes) -> list[Image]:
    """Every frame that torchcodec's `VideoDecoder` delivers in its exact mode."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(video, seek_mode="exact", dimension_order="NHWC")
    return [frame.numpy() for frame in decoder]


def read_ffmpeg(video: bytes, executable: str, folder: Path) -> list[Image]:
    """Every frame that the command-line ffmpeg delivers, one by one as it finds them."""
    path = folder / "ffmpeg.mp4"
    path.write_bytes(video)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        width, height = context.width, context.height
        turned = next(container.decode(video=0)).rotation % 180 != 0
    width, height = (height, width) if turned else (width, height)
    command = [executable, "-nostdin", "-v", "error", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    result = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, timeout=60, check=True)
    return list(np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3))
