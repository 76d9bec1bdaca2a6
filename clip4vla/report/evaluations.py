"""Read the evaluations of a run, which lie beside each other in RUN/eval/NAME/, and show all of them on its page."""

import math
import re
from html import escape
from pathlib import Path
from typing import Any

from clip4vla.checkpoints.best import HIGHER, LOWER
from clip4vla.config_io import read_tree
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_text
from clip4vla.report import page
from clip4vla.report.sections.retrieval import arrow

TEST = "test"  # the run's own: data.test and settings as in its config.yaml
VALIDATION = "val-"  # begins the names of those on data.val, during training
NONE = "–"
SHOWN = re.compile(r'<section id="evaluations">.*?</section>', re.DOTALL)


def folders(run: str | Path) -> list[Path]:
    """List the folders of a run's evaluations that are complete, TEST first; without those on data.val."""
    complete = [file.parent for file in Path(run, "eval").glob("*/metrics.json")]
    named = [folder for folder in complete if not folder.name.startswith(VALIDATION)]
    return sorted(named, key=lambda folder: (folder.name != TEST, folder.name))


def page_path(run: str | Path, name: str) -> Path:
    """Return where the page of an evaluation lies: RUN/report.html for TEST, else beside its metrics.json."""
    return Path(run, "report.html") if name == TEST else Path(run, "eval", name, "report.html")


def by_setting(tree: dict[str, Any]) -> dict[str, Any]:
    """Give settings dotted keys, SECTION.NAME, and leave out run_dir.

    Not config_io.flatten: a setting that is a dictionary, as data.train is, stays one value.
    """
    flat: dict[str, Any] = {}
    for section, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{section}.{name}": setting for name, setting in value.items()}
        else:
            flat[f"{section}"] = value
    return {key: value for key, value in flat.items() if key != "run_dir"}


def data_set(manifest: dict[str, Any]) -> tuple[str, str]:
    """Name the (source, split) of a manifest, joined by + where the gallery holds several."""
    sources = manifest["sources"]
    source = "+".join(dict.fromkeys(entry["source"] for entry in sources.values()))
    return source, "+".join(dict.fromkeys(entry["split"] for entry in sources.values()))


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Read metrics.json by direction; nothing if there is none. UserError if it cannot be read."""
    path = folder / "metrics.json"
    tree = read_tree(path) if path.exists() else {}
    return {direction: row for direction, row in tree.items() if isinstance(row, dict)}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return of a direction's row the metrics, without the sizes n_*."""
    return {
        name: value
        for name, value in row.items()
        if page.is_number(value) and math.isfinite(value) and not name.startswith("n_")
    }


def formatted(row: dict[str, Any], name: str) -> tuple[str, str]:
    """Format a number of a direction and its 95% interval: ("46.2", "[43.1, 49.3]"); (NONE, "") where there is none."""
    value, interval = numbers(row).get(name), row.get("ci")
    if value is None:
        return NONE, ""
    shown = "{:.2g}".format if name == "p_value" else "{:.1f}".format
    ends = interval.get(name) if isinstance(interval, dict) else None
    if not isinstance(ends, list) or not ends or not all(map(page.is_number, ends)):
        return shown(value), ""
    return shown(value), f"[{', '.join(map(shown, ends))}]"


def section(run: str | Path) -> str:
    """Return HTML of the main numbers of all evaluations of a run; nothing unless there are two."""
    some = folders(run)
    if len(some) < 2:
        return ""
    head = "".join(f"<th>{name}" for name in ("evaluation", "data", "clips", "step", "", "numbers"))
    rows = "".join(f"<tbody>{_rows(folder)}</tbody>" for folder in some)
    note = "Each lies in eval/NAME with its manifest, and has a page; this one is of test. In brackets: 95% intervals."
    table = f'<div class="scroll"><table><thead><tr>{head}</thead>{rows}</table></div><p class="note">{note}</p>'
    return f'<section id="evaluations"><h2>Evaluations of this run</h2>{table}</section>'


def _rows(folder: Path) -> str:
    """Return the table rows of an evaluation, one for each direction without its subsets."""
    try:
        manifest = read_tree(folder / "manifest.json")
        data, step = "/".join(data_set(manifest)), manifest.get("checkpoint", {}).get("step", NONE)
        about = [folder.name, data, manifest.get("n_ids", NONE), step]
        rows = {direction: row for direction, row in scores(folder).items() if "/" not in direction}
    except (UserError, LookupError, TypeError, AttributeError) as error:
        return f'<tr><td>{escape(folder.name)}</td><td colspan="5">not readable: {escape(str(error))}</td></tr>'
    cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in about)
    return "".join(
        f"<tr>{cells}<td>{escape(arrow(key))}</td><td>{_numbers(row)}</td></tr>" for key, row in rows.items()
    )


def _numbers(row: dict[str, Any]) -> str:
    cells = {name: formatted(row, name) for name in (*HIGHER, *LOWER) if name in numbers(row)}
    return " · ".join(f"{name} <b>{value}</b> <i>{interval}</i>" for name, (value, interval) in cells.items())


def show(run: str | Path) -> None:
    """Write section() into RUN/report.html, which is of TEST, if it is there: in the place of an earlier one."""
    path = page_path(run, TEST)
    if path.is_file():
        text = SHOWN.sub("", path.read_text(encoding="utf-8"), count=1)
        made = section(run).encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text
        write_text(path, text.replace("</header>", f"</header>{made}", 1))
