"""Walk the folders of people's files, without what is hidden and what operating systems keep beside them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

SYSTEM = {  # names in lower case: of file systems, NAS boxes, macOS and Windows; macOS's ._x begins with a dot
    "lost+found", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx", "$recycle.bin",
    "system volume information", "thumbs.db", "desktop.ini",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is nobody's data: .x, ._x, and the names in SYSTEM."""
    return name.startswith(".") or name.casefold() in SYSTEM


def walk(
    root: str | Path, follow_links: bool = False, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, names of folders in it, names of files in it), both sorted, of a tree; the root may be hidden itself.

    The caller may shorten the list of folders: what is removed from it is not walked. Raises what on_error raises, which is
    given what cannot be read; without it that is left out.
    """
    for folder, below, files in os.walk(root, onerror=on_error, followlinks=follow_links):
        below[:] = sorted(name for name in below if not is_hidden(name))
        yield folder, below, sorted(name for name in files if not is_hidden(name))
