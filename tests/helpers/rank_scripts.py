"""Scripts of one rank: training with files of bounded size or until a signal, long work of rank 0, and many commands.

Signals come from within the moment that they are to hit: sent from outside, they would miss it on a quick or a busy machine.
"""

LIMITED = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if os.environ.get("RANK", "0") == sys.argv[1]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
sys.argv = ["launch/pretrain.py", *(word.replace("{RANK}", os.environ.get("RANK", "0")) for word in sys.argv[3:])]
sys.path.insert(0, "launch")
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""
SIGNALLED = """
import os, runpy, signal
from clip4vla.{module} import {name} as Held
begin = Held.{method}
def signalled(self, *arguments):
    if os.environ["RANK"] == "{rank}" and {when}:
        os.kill(os.getpid(), signal.{signal})
    return begin(self, *arguments)
Held.{method} = signalled
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""
DRIVER = """import contextlib, io, json, runpy, sys
out = []
for script, *words in json.loads(sys.argv[-1]):
    sys.argv, code = [script, *words], 0
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as shown:
        try: runpy.run_path(script, run_name="__main__")
        except SystemExit as end: code = end.code
    out.append((code, shown.getvalue(), said.getvalue()))
print("\\n" + json.dumps(out))
"""  # one process for many commands saves the imports
LONG = """
import sys, time
from pathlib import Path
sys.path.insert(0, ".")
from clip4vla.distributed import collectives
from clip4vla.checkpoints import remote, universal
from clip4vla.distributed.rank_0 import run_on_rank_0
from clip4vla.distributed.watchdog import watch

def work(passed):
    parts, pieces = [], []

    def noting(places):
        def tell(place):
            places.append(place)
            passed(place)

        return tell

    universal.convert(Path(sys.argv[1]), noting(parts))
    remote.download(sys.argv[2], Path(sys.argv[3]), passed=noting(pieces))
    for second in range(8):
        time.sleep(1)
        passed(f"second {second}")
    return sum("converting" in part for part in parts), sum("syncing" in part for part in parts), len(pieces)

watch.enabled = True
collectives.setup(minutes=0.03)
before = watch.n_progress
print(*run_on_rank_0(work)[0], watch.n_progress - before, watch.phase, sep=",")
collectives.barrier()
watch.stop()
"""
