"""Scripts one behind the other in one process: imports take longer than their tiny runs. Its one argument: a JSON file with
the words of each."""

import json
import runpy
import sys
from pathlib import Path

for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
