"""Name the suffixes of files that hold moving pictures or sound, in the order of preference. Imports nothing."""

VIDEOS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ts", ".wmv", ".ogv"),
    *(".mts", ".m2ts", ".m2t", ".3g2", ".vob", ".asf", ".f4v", ".mxf", ".qt", ".mpe", ".divx", ".ogm"),
    ".",  # names that end in a dot, as a downloader writes that does not know the suffix
)
SOUNDS = (
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma"),
    *(".mka", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".mp2", ".m4b", ".oga", ".weba", ".ac3", ".amr"),
    *(".w64", ".wv", ".ape", ".tta", ".spx"),
)


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; of a name that ends in a dot, the dot."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def stem_of(path: str) -> str:
    """Return a file's name without its suffix."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name
