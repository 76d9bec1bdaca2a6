"""Read the annotations of sets of speech; see data_prep/annotations.py."""

import hashlib
import os

from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import ManifestRow, MediaFolder, slug

GRID: list[dict[str, str]] = [  # the words of a sentence by the letters of its file's name; {}: the letter itself
    {word[0]: word for word in words.split()}
    for words in ("bin lay place set", "blue green red white", "at by in with", "", "again now please soon")
]
GRID.insert(4, dict(zip("z123456789", "zero one two three four five six seven eight nine".split(), strict=True)))


def grid(media: MediaFolder) -> RowsOrSkipped:
    """3 s of people who say six words each, which the file's name spells: bbaf2n, "bin blue at f two now".

    The files of one sentence are in one split, by a hash of its name: 70% train, 10% val, 20% test.
    """

    def row(_: str, path: str) -> ManifestRow:
        speaker, name = os.path.split(os.path.splitext(path)[0])
        words = [spelt.get(letter, "") if spelt else letter for letter, spelt in zip(name, GRID, strict=True)]
        if not all(words):
            raise ValueError(f"{name} spells no sentence of GRID's")
        place = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
        split, more = "test" if place < 20 else "val" if place < 30 else "train", {"audio_type": "vb", "group": name}
        return annotation_io.whole_row("grid", split, f"{slug(speaker)}_{name}", path, [" ".join(words)], **more)

    lines = (
        (path, "", path)
        for path in sorted(media.paths)
        if len(os.path.splitext(os.path.basename(path))[0]) == len(GRID)
    )
    return annotation_io.rows(lines, row)
