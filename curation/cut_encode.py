"""A clip by one x264 pass: ffmpeg decodes from the key frame before the shot, picks exactly the planned frames, and may scale
and change the frame rate on the way.

ffmpeg runs in a process group of its own, under limits on wall time and memory, decodes nothing but the codecs that `media` and
`AUDIO_DECODERS` list, and the end of what it said goes into the error.
The same source, span, settings and ffmpeg give the same bytes.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from videofactory.curation.cut_plan import Plan
from videofactory.curation.media import _DECODERS as VIDEO_DECODERS
from videofactory.curation.media import MediaError

_INDEXED = frozenset({"mov", "matroska"})
"""Containers in which seeking lands on the key frame before the given time."""

_STDERR_CHARACTERS = 2000
_GRACE_SECONDS = 2.0
"""How long ffmpeg may take to end after it was asked to, before it is killed."""

MEMORY_BYTES = 4 * 2**30
"""Address space of ffmpeg with two threads. Decoding and encoding 3840x2160 with preset medium takes between 2 and 3 GiB."""

_THREAD_MEMORY_BYTES = 256 * 2**20
"""Address space for each further thread: its heap, and the frames that it holds."""

_BLOCK_BYTES = 2**30
"""The largest single block that ffmpeg may ask for; a frame of 16384x16384 takes 384 MiB."""

AUDIO_DECODERS = (
    *("aac", "aac_latm", "ac3", "eac3", "dca", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "truehd", "mlp"),
    *("opus", "libopus", "vorbis", "libvorbis", "flac", "alac", "speex", "libspeex", "nellymoser", "amrnb", "amrwb", "dvaudio"),
    *("wmav1", "wmav2", "wmapro", "wmalossless", "wmavoice", "adpcm_ms", "adpcm_ima_wav", "adpcm_ima_qt", "adpcm_swf", "s302m"),
    *("pcm_s8", "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be"),
    *("pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw", "pcm_dvd", "pcm_bluray"),
)
"""Audio codecs, by their decoders, that may be decoded where the sound is kept."""

# The list that the message quotes may be all that is left of it.
_NOT_USED = re.compile("not on whitelist|,pcm_bluray'$|,msmpeg4'$")
"""What ffmpeg says of streams whose decoder it may not open; if the clip needs one of them, ffmpeg fails."""

_OUT_OF_MEMORY = re.compile("Cannot allocate memory|Out of memory|malloc of size|bad_alloc", re.IGNORECASE)

_BEFORE_KEY_FRAME = re.compile(
    "non-existing PPS|decode_slice_header error|no frame!|sps_id|Missing picture start code|Invalid frame dimensions"
    "|First slice in a frame missing|co located POCs unavailable|PPS id out of range|Could not find ref with POC"
)
"""What decoders say of the packets before the first key frame where a container without an index was entered midway: nothing
of it concerns the span. Every other complaint does, or may."""

_LARGEST_TIMESCALE = 1_000_000
_SMALLEST_TIMESCALE = 10_000


@dataclass(frozen=True)
class Encoding:
    """How to encode; the fields are those of `cut.ClipSettings`."""

    crf: int
    preset: str
    height: int | None
    fps: float | None
    audio: bool
    threads: int


def find_ffmpeg() -> str:
    """The ffmpeg to run: `$FFMPEG`, else the one on the PATH, else the one that the imageio-ffmpeg package brings along.

    Raises:
        MediaError: `ffmpeg_missing`.
    """
    chosen = os.environ.get("FFMPEG")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise MediaError(
                "ffmpeg_missing", f"$FFMPEG is {chosen!r}, which is no executable file: correct or unset it", retryable=True
            )
        return found
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise MediaError(
            "ffmpeg_missing",
            "no ffmpeg found: set $FFMPEG, put ffmpeg on the PATH, or install the package imageio-ffmpeg",
            retryable=True,
        ) from error


def output_size(plan: Plan, height: int | None) -> tuple[int, int]:
    """Width and height of the encoded picture: square pixels, both even, never larger than the source is shown.

    Args:
        plan: the span.
        height: wanted height in pixels, `None` for the source's.
    """
    width, shown = plan.display_size
    wanted = shown if height is None else min(height, shown)
    return max(2, round(width * wanted / shown / 2) * 2 if wanted < shown else width // 2 * 2), max(2, wanted // 2 * 2)


def encode_span(plan: Plan, target: Path, encoding: Encoding, *, seconds: float, seek: bool = True) -> None:
    """Encode the frames of `plan` into the MP4 file `target`; the first one gets timestamp 0.

    Args:
        plan: the frames to deliver.
        target: file to write.
        encoding: how.
        seconds: wall-time limit.
        seek: whether to skip to the span; without, the source is decoded from its beginning, which always finds every frame.

    Raises:
        MediaError: `ffmpeg_missing`, `encode_failed`, `encode_timeout`, or `decode_failed`: a clip was written, but the decoder
            complained, so its pictures may be damaged.
    """
    command = encode_command(find_ffmpeg(), plan, target, encoding, seconds=seconds, seek=seek)
    memory = MEMORY_BYTES + max(0, encoding.threads - 2) * _THREAD_MEMORY_BYTES
    said = run_limited(command, seconds=seconds, memory_bytes=memory)
    complaints = [line for line in said.splitlines() if not (_BEFORE_KEY_FRAME.search(line) or _NOT_USED.search(line))]
    if any(_OUT_OF_MEMORY.search(line) for line in complaints):
        raise MediaError("encode_failed", f"{plan.source.name}: ffmpeg used up its {memory / 2**20:.0f} MiB: {complaints[-1]}")
    if complaints:
        raise MediaError("decode_failed", f"{plan.source.name}: the decoder complains about the span: {complaints[-1]}")


def encode_command(executable: str, plan: Plan, target: Path, encoding: Encoding, *, seconds: float, seek: bool) -> list[str]:
    """The command line of `encode_span`."""
    import ffmpeg

    # Only the demuxer that was found is used, and only local files: a playlist posing as a video cannot make ffmpeg read others.
    given: dict[str, Any] = {"f": plan.format, "protocol_whitelist": "file", "threads": encoding.threads}
    position = _seek_position(plan)
    sound = encoding.audio and plan.audio_codec is not None
    given["codec_whitelist"] = ",".join([*(AUDIO_DECODERS if sound else ()), *VIDEO_DECODERS])
    if seek and position is not None:
        given |= {"ss": f"{position:.6f}", "seek_timestamp": 1, "noaccurate_seek": None}
    source = ffmpeg.input(f"file:{plan.source.resolve()}", **given)
    streams = [_video(source[str(plan.stream)], plan, encoding)]
    if sound:
        streams.append(_sound(source["a:0"], plan))
    command = ffmpeg.output(*streams, str(target), **_output_options(plan, encoding, sound)).compile(cmd=executable)
    # Timestamps stay the source's own up to the filters (-copyts). The limit on CPU time ends an ffmpeg whose parent was killed.
    # With `repeat`, no complaint hides behind "Last message repeated".
    limit = str(max(1, round(seconds * (encoding.threads + 2))))
    general = ["-nostdin", "-hide_banner", "-v", "repeat+error", "-y", "-copyts", "-filter_threads", "1", "-timelimit", limit]
    general += ["-max_alloc", str(_BLOCK_BYTES)]
    return [command[0], *general, *command[1:]]


def _seek_position(plan: Plan) -> float | None:
    """Where ffmpeg should start reading, in seconds; `None` for the beginning."""
    # The key frame's time, never the shot's: an index may list an open group by a decoding time before frames that need others.
    position = plan.seconds(plan.key) + (0.0001 if plan.stated and plan.format in _INDEXED else -1.0)
    return position if position > plan.first + 2.0 else None


def _video(stream: Any, plan: Plan, encoding: Encoding) -> Any:
    """The filters that pick and shape the frames. ffmpeg turns the picture upright before them."""
    times = plan.times
    gaps = [b - a for a, b in pairwise(times)] + ([plan.after - times[-1]] if plan.after is not None else [])
    gap = min(gaps, default=1)
    stream = stream.filter("settb", _ratio(plan))
    # The edges stand between frames, in whole ticks, so that no rounding decides about a frame.
    stream = stream.filter("trim", start_pts=times[0] - gap // 4, end_pts=times[-1] + max(1, gap // 2))
    stream = stream.filter("setpts", "PTS-STARTPTS")
    if encoding.fps is not None:
        stream = stream.filter("fps", fps=f"{encoding.fps:.6g}", start_time=0)
    width, height = output_size(plan, encoding.height)
    shown = plan.display_size
    if plan.sample_aspect == 1 and shown[0] - width < 2 and shown[1] - height < 2:
        # At most an odd row and column are lost: cheaper and sharper than scaling by a pixel.
        stream = stream.filter("crop", width, height, 0, 0)
    else:
        stream = stream.filter("scale", width, height, flags="lanczos+accurate_rnd+full_chroma_int+bitexact")
    return stream.filter("setsar", 1).filter("format", "yuv420p")


def _sound(stream: Any, plan: Plan) -> Any:
    """The sound between the first frame and the end of the last, with the first frame's time as zero."""
    begin = plan.seconds(plan.times[0])
    end = plan.seconds(plan.after if plan.after is not None else plan.times[-1] + (plan.times[-1] - plan.times[0]) + 1)
    return stream.filter("atrim", start=f"{begin:.6f}", end=f"{end:.6f}").filter("asetpts", f"PTS-{begin:.6f}/TB")


def _ratio(plan: Plan) -> str:
    return f"{plan.time_base.numerator}/{plan.time_base.denominator}"


def _timescale(plan: Plan) -> int:
    """Ticks per second of the clip: a multiple of the source's, so that its timestamps are kept exactly."""
    ticks = plan.time_base.denominator
    if ticks > _LARGEST_TIMESCALE:
        return 90_000
    return ticks * -(-_SMALLEST_TIMESCALE // ticks)


def _output_options(plan: Plan, encoding: Encoding, sound: bool) -> dict[str, Any]:
    """Options of the encoder and the muxer."""
    options: dict[str, Any] = {
        "c:v": "libx264",
        "preset": encoding.preset,
        "crf": encoding.crf,
        "threads": encoding.threads,
        "fps_mode": "passthrough" if encoding.fps is None else "cfr",
        "flags:v": "+bitexact",
        "fflags": "+bitexact",
        "map_metadata": -1,
        "map_chapters": -1,
        "movflags": "+faststart",
        "f": "mp4",
    }
    if encoding.fps is None:
        options |= {"enc_time_base:v": f"1/{_timescale(plan)}", "video_track_timescale": _timescale(plan)}
    else:
        options["r"] = f"{encoding.fps:.6g}"
    if sound:
        options |= {"c:a": "aac", "b:a": "128k", "flags:a": "+bitexact"}
    return options


def run_limited(command: list[str], *, seconds: float, memory_bytes: int = MEMORY_BYTES) -> str:
    """Run `command` in a process group of its own, with `memory_bytes` of address space, and wait at most `seconds` for it.

    Returns:
        The end of what it wrote to its standard error.

    Raises:
        MediaError: `encode_failed` (it ended with an error; the message ends with what it said) or `encode_timeout` (it was stopped;
            nothing of its group is left).
    """
    tail: deque[str] = deque(maxlen=_STDERR_CHARACTERS)
    try:
        process = subprocess.Popen(
            [*_confinement(memory_bytes), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise MediaError("ffmpeg_missing", f"{command[0]} cannot be started: {error}", retryable=True) from error
    reader = threading.Thread(target=_drain, args=(process.stderr, tail), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=max(0.0, seconds))
        finished = True
    except subprocess.TimeoutExpired:
        finished = False
    finally:
        _stop(process)
        reader.join(timeout=_GRACE_SECONDS)
    said = "".join(tail).strip()
    last = f"Its last words: {said or '(none)'}"
    if not finished:
        why = f"did not finish within {seconds:.1f} s and was stopped; allow more seconds if the clip is long"
        raise MediaError("encode_timeout", f"{command[0]} {why}. {last}", retryable=True)
    if code != 0:
        raise MediaError("encode_failed", f"{command[0]} ended with code {code}. {last}", retryable=False)
    return said


def _confinement(memory_bytes: int) -> list[str]:
    """The programs of util-linux, where they are there, that confine the program named after them and then become it."""
    prefix = []
    # Linux can end a program with its parent, whatever ends that.
    if setpriv := shutil.which("setpriv"):
        prefix += [setpriv, "--pdeathsig", "KILL"]
    if prlimit := shutil.which("prlimit"):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        prefix += [prlimit, f"--as={memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)}"]
    return prefix


def _drain(pipe: Any, tail: deque[str]) -> None:
    """Keep the end of what comes through `pipe`, so that the writer never blocks on a full one."""
    with pipe:
        while chunk := pipe.read1(4096):
            tail.extend(chunk.decode("utf-8", "replace"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End `process` and its group, politely and then for good, and reap it."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
    # Whatever it had started and left behind.
    _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the group that `process` leads; it is no error if nobody is left in it."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
