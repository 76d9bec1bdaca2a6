"""Read from the name of a media file which video it is of, and which interval: as authors and downloaders write names.

A name is read without its suffix. A YouTube id has 11 characters of A-Za-z0-9_-, so that it ends where it must, whatever it
holds. What may be two videos is both, and marked so.
"""

import functools
import re
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from clip4vla.config_io import parse_json

NUMBER = r"(\d+(?:\.\d+)?)"
INTERVAL = rf"(?:_{NUMBER}(?:[_-]{NUMBER})?)?"
VIDEO = r"([A-Za-z0-9_-]{11})"
CLIP = re.compile(rf"(Y?){VIDEO}{INTERVAL}", re.ASCII)
TITLED = re.compile(rf".*\[{VIDEO}\]", re.DOTALL)
DASHED = re.compile(rf".+-{VIDEO}", re.DOTALL)
OTHER_CLIPS = [  # of ids that are not YouTube's
    re.compile(f"(.+){times}", re.DOTALL | re.ASCII) for times in ("", f"_{NUMBER}", f"_{NUMBER}[_-]{NUMBER}")
]
UNMERGED = re.compile(
    r"\.f(\d+)(?:-\w+)?", re.ASCII
)  # what yt-dlp leaves where it cannot merge: ID.f137.mp4, ID.f251.webm
SOUND_FORMATS = {  # YouTube's formats that hold sound alone
    *("139", "140", "141", "171", "172", "233", "234", "249", "250", "251", "256", "258", "325", "327", "328", "338"),
    *("380", "599", "600", "773", "774"),
}
LISTED = re.compile(r"\d{5,}(_\d+)?", re.ASCII)  # video2dataset's: a number in its list, and of a clip of it
SHORTEST = 1000  # ms of a clip that ends early: 0_5 is rather 5 s than 5 ms
IN_URL = re.compile(rf"(?:[?&]v=|youtu\.be/|/embed/|/shorts/|/v/){VIDEO}(?![A-Za-z0-9_-])")
ID_KEYS = ("videoID", "video_id", "youtube_id", "ytid", "YTID", "id")


class Form(IntEnum):
    """How a name says which clip it is, the surest first. From WHOLE on it is that of a whole video."""

    START_END = 0
    START = 1
    SHORTER = 2  # START_END of a clip that ends before it should, where the video does
    YID = 3  # AudioSet's
    OWN_NAME = 4  # not by its video: such as AudioCaps' number of a caption
    WHOLE = 5
    TITLE = 6  # Title [ID], yt-dlp's
    DASH = 7  # Title-ID, youtube-dl's


class ReadName(NamedTuple):
    """A video that a file may be of, and its interval as the name spells it."""

    video: str
    form: Form = Form.WHOLE
    start: str = ""
    end: str = ""
    is_sure: bool = True
    is_unmerged: bool = False

    @property
    def number(self) -> int | None:
        """Return N of a name VIDEO_N, which may be a time, or that of one of the video's clips; None for other names."""
        return int(self.start) if self.start.isdigit() and len(self.start) != 6 and not self.end else None

    def form_for(self, start: float, end: float) -> Form | None:
        """Return how the name says that the file is of the interval (s); None if it is of another one."""
        return _form_of_times(self.start, self.end, start, end) if self.start else self.form


@functools.lru_cache(1 << 12)  # millions of clips begin at few different times
def _form_of_times(spelt_start: str, spelt_end: str, start: float, end: float) -> Form | None:
    """Return how the times in a name say that it is of the interval (s); None if they are of another one."""
    if _is_seconds(spelt_start, start) and not spelt_end:
        return Form.START
    if _is_seconds(spelt_start, start) and _is_seconds(spelt_end, end):
        return Form.START_END
    if "." in spelt_start + spelt_end or int(spelt_start) != round(start * 1000):
        return None
    if not spelt_end:
        return Form.START
    if int(spelt_end) == round(end * 1000):
        return Form.START_END
    return Form.SHORTER if SHORTEST <= int(spelt_end) - int(spelt_start) < (end - start) * 1000 else None


def _is_seconds(text: str, time: float) -> bool:
    """Tell whether the text is the time (s): to the thousandth, or in six digits cut to whole seconds."""
    return abs(float(text) - time) < 0.001 or (len(text) == 6 and text.isdigit() and int(text) == int(time))


def read_name(stem: str) -> list[ReadName]:
    """Return the videos that a file of this name, without suffix, may be of."""
    name = _clip(stem)
    if name and not stem.startswith("v_"):
        return [name]
    if unmerged := _unmerged(stem):
        return [name._replace(is_unmerged=True) for name in read_name(stem[: unmerged.start()])]
    if stem.startswith("v_") and (names := _names_after_v(stem)):
        return names
    if match := TITLED.fullmatch(stem):
        return [ReadName(match[1], Form.TITLE)]
    if match := DASHED.fullmatch(stem):
        return [ReadName(match[1], Form.DASH)]
    return [*_other_names(stem)]


def plain_id(stem: str) -> str | None:
    """Return the one YouTube id that a name of the commonest forms begins with; None for others, which read_name reads."""
    match = CLIP.fullmatch(stem)
    return match[2] if match and not stem.startswith("v_") else None


def _clip(stem: str) -> ReadName | None:
    if not (match := CLIP.fullmatch(stem)):
        return None
    prefix, video, start, end = match.groups("")
    return ReadName(video, Form.YID if prefix else Form.WHOLE, start, end)


def _names_after_v(stem: str) -> list[ReadName]:
    """Return the readings of a name that begins with v_, which may be part of the id."""
    names = [name for name in (_clip(stem), _clip(stem[2:])) if name and name.form == Form.WHOLE]
    if len(names) > 1 and names[0].end:
        return names[:1]
    # v_abcdefghi_3 is the video abcdefghi_3, or v_abcdefghi from 3 s on
    return [name._replace(is_sure=len(names) == 1) for name in names]


def _unmerged(stem: str) -> re.Match[str] | None:
    return UNMERGED.fullmatch(stem, stem.rfind(".f")) if ".f" in stem else None


def _other_names(stem: str) -> Iterator[ReadName]:
    """Yield the readings of a name without a YouTube id: each begin of it may be the id."""
    for match in filter(None, (pattern.fullmatch(stem) for pattern in OTHER_CLIPS)):
        video, start, end = (*match.groups(), "", "")[:3]
        yield ReadName(video, Form.WHOLE, start, end)
        if video.startswith("Y"):
            yield ReadName(video[1:], Form.YID, start, end)
        if video.startswith("v_"):
            yield ReadName(video[2:], Form.WHOLE, start, end)


def holds_sound_alone(stem: str) -> bool:
    """Tell whether the name is that of an unmerged format of YouTube's that holds sound alone."""
    unmerged = _unmerged(stem)
    return bool(unmerged and unmerged[1] in SOUND_FORMATS)


def read_listed(path: Path) -> ReadName | None:
    """Return the video of a file that is named by a number, as the .json beside it says; None if there is none.

    video2dataset writes so: NUMBER.mp4 is a whole video, NUMBER_CLIP.mp4 the interval in "clips".
    """
    if not (numbered := LISTED.fullmatch(path.stem)):
        return None
    try:
        listed = parse_json(path.with_suffix(".json").read_bytes())
        video = _listed_video(listed)
        if not video or not numbered[1]:
            return ReadName(video) if video else None
        ((start, end),) = listed["clips"]
        return ReadName(video, Form.WHOLE, f"{seconds(start):.3f}", f"{seconds(end):.3f}")
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _listed_video(listed: dict[str, Any]) -> str | None:
    """Return the YouTube id in a json of video2dataset's, by its url or one of the columns that ids usually have."""
    if match := IN_URL.search(str(listed.get("url"))):
        return match[1]
    ids = {listed[key] for key in ID_KEYS if isinstance(listed.get(key), str)}
    return ids.pop() if len(ids) == 1 else None


def seconds(time: float | str) -> float:
    """Return the seconds of a time in seconds or HH:MM:SS.mmm; ValueError for what is neither."""
    total = 0.0
    for part in str(time).split(":"):
        total = 60 * total + float(part)
    return total
