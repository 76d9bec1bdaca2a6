"""Fuzzing of all that the program reads as text: 1,000 corrupt files and more of each kind, one by one, each watched.

A case ends with a correct result, with a skip or a corrupt sample that is counted, or with one printable line; it takes less
than 20 s, reads and writes nothing outside of its root, starts no process and opens no connection.
"""

from pathlib import Path
from typing import Any

from faults import _text_annotations, _text_data, _text_judge, _text_runs, _text_settings
from faults._watch import LINE, MEMORY, SECONDS, Target, run

TARGETS: list[Target] = [
    target for module in (_text_settings, _text_annotations, _text_data, _text_runs) for target in module.TARGETS
]


def campaign(folder: Path, seed: int) -> dict[str, Any]:
    """Figures by target: cases, outcomes by kind, the slowest case, what memory came on top."""
    found = {target.name: run(target, folder, seed) for target in TARGETS}
    found["judge's port"] = _text_judge.storm(1000, seed)
    outcomes: dict[str, int] = {}
    for figures in found.values():
        for outcome, count in figures["outcomes"].items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    total = sum(figures["cases"] for figures in found.values())
    bounds = {"seconds_of_a_case": SECONDS, "mib_of_a_target": MEMORY >> 20, "characters_of_a_line": LINE}
    return {"cases": total, "outcomes": outcomes, "bounds": bounds, "targets": found}
