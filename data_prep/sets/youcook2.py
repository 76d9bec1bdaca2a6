"""YouCook2: steps of recipes, in whole videos or in clips that are named by the step's number or by its start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import annotation_io
from data_prep.annotation_io import Line, RowsOrSkipped
from data_prep.manifest import AmbiguousError, ManifestRow, MediaFolder

SPLITS = {"training": "train", "validation": "val", "testing": "test"}


def youcook2(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """Steps of recipes: one row per annotated segment, label = the recipe's number.

    Two steps of one segment are two rows of one group: either clip answers both captions.
    """
    (path,) = annotation_io.require_files(place, "youcookii_annotations_trainval.json")
    database = annotation_io.read_json(path, dict, database=dict)["database"]
    step_names = StepNames(database, media)
    seen: set[str] = set()

    def row(_: str, step: tuple[str, dict[str, Any], dict[str, Any]]) -> ManifestRow:
        video, annotation, segment = step
        if annotation["subset"] not in SPLITS:
            raise ValueError(f"subset {annotation['subset']!r} is not one of {', '.join(SPLITS)}")
        recipe, (start, end) = annotation["recipe_type"], map(float, segment["segment"])
        made = annotation_io.clip_row(
            media,
            "youcook2",
            SPLITS[annotation["subset"]],
            video,
            start,
            end,
            [segment.get("sentence", "")],
            naming=step_names.of(video, segment.get("id"), start),
            label=None if recipe is None else str(recipe),
        )
        if made.id in seen:
            made.id += f"_{segment['id']}"
        seen.add(made.id)
        return made

    return annotation_io.rows(_lines(path, database), row)


def _lines(path: Path, database: dict[str, Any]) -> Iterator[Line]:
    for video, annotation in database.items():
        for segment in _segments(annotation) or [{}]:
            yield f"{path.name}: {video}", "", (video, annotation, segment)


def _segments(annotation: Any) -> list[Any]:
    segments = annotation.get("annotations") if isinstance(annotation, dict) else None
    return segments if isinstance(segments, list) else []


class StepNames:
    """Tells whether files named ID_3 are the fourth steps or those from 3 s on: by those that can be only one of them."""

    def __init__(self, database: dict[str, Any], media: MediaFolder):
        self.media = media
        self.numbers: dict[str, set[int]] = {}  # of a video's steps
        self.starts: dict[str, set[float]] = {}  # s
        by_number = by_start = False
        for video, annotation in database.items():
            steps = [step for step in _segments(annotation) if isinstance(step, dict)]
            spans = [span for step in steps if isinstance(span := step.get("segment"), list) and span]
            self.numbers[video] = {number for step in steps if isinstance(number := step.get("id"), int)}
            self.starts[video] = {span[0] for span in spans if isinstance(span[0], int | float)}
            there = media.numbers(video)
            by_number |= bool((there & self.numbers[video]) - self.starts[video])
            by_start |= bool((there & self.starts[video]) - self.numbers[video])
        self.by_number, self.by_start = by_number, by_start

    def of(self, video: str, number: Any, start: float) -> dict[str, Any]:
        """Return the arguments of MediaFolder.find_clip that say how the clips are named.

        Raises AmbiguousError if a file may be this step's or another's.
        """
        own_name = f"{video}_{number}"
        if self.by_number != self.by_start:
            return {"own_name": own_name, "by_start": False} if self.by_number else {}
        for name in self.media.numbers(video) & {number, start}:
            if number != start and name in self.numbers[video] & self.starts[video]:
                raise AmbiguousError(f"{video}_{name} may be step {name} or the one from {name} s on: rename the clips")
        return {"own_name": own_name}
