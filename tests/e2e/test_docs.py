"""The pages under docs/: every error message has its entry, every command parses or runs, every link leads somewhere, and the
guides' diffs apply to this repository and do what they say."""

import ast
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import messages
import pytest
import yaml
from forks import ROOT, Job
from running import TINY, free_port, job, trace

from clip4vla.config import DataConfig, ImportConfig, RunConfig
from clip4vla.config_io import describe, load

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
KEYS = {key for cls in (RunConfig, DataConfig) for key, _, _ in describe(cls)}
PLACEHOLDER = re.compile(r"[A-Z]{2,}|…|\.\.\.")  # CONFIG, RUN, OLD: a name of the reader's own


# Messages


def entries() -> list[str]:
    """The messages that the page lists, each of which has a line on its cure."""
    return [found[1].strip() for found in re.findall(r"^- (`+)(.+?)\1\n  \S", PAGES["troubleshooting.md"], re.M)]


def test_each_message_of_an_error_has_its_cure_on_the_page():
    listed = entries()
    missing = {text: where for text, where in messages.raised().items() if text not in listed}
    assert not missing, "\n".join(
        f"- `{text}`   ({where})" for text, where in sorted(missing.items(), key=lambda x: x[1])
    )
    assert len(set(listed)) == len(listed) > 200


def test_no_entry_of_the_page_is_stale():
    scripts = "".join(path.read_text() for path in (ROOT / "launch/slurm").iterdir())
    known = messages.texts()
    stale = [
        text for text in entries() if text not in known and not all(part.strip() in scripts for part in text.split("…"))
    ]
    assert not stale, stale


def test_the_texts_of_an_expression_are_told_apart():
    def said(code: str) -> list[str]:
        (node,) = ast.parse(code).body
        return [messages.plain(text) for text in messages.said(node.value, {"why": ast.Constant("too late")})]

    assert said("f'{a}{b}: no {c!r} in {d:.2f}, {why}'") == ["…: no … in …, too late"]
    assert said("failed or f'{x}: none'") == ["…", "…: none"]
    assert said("'one' if few else f'{n} runs'") == ["one", "… runs"]
    assert said('f\'{x}: no checkpoint{f" of {step}" if step else ""} there\'') == ["…: no checkpoint… there"]


# Commands


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands(page: str, blocks_only: bool = False) -> list[Command]:
    """Those in ```bash blocks; also indented ones and those in the text, in `quotes`."""
    text = PAGES[page]
    found = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M) for line in joined(block)]
    if not blocks_only:
        plain = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        found += [line.strip() for line in re.findall(r"^    (?! *\.\.\. )\S.*", plain, re.M) if runs(line.strip())]
        quoted = [line for line in re.findall(r"`([^`\n]+)`", plain) if re.search(r"\.py\b|\.sbatch\b| -[cm] ", line)]
        found += [line for line in quoted if runs(line)]
    values = dict(pair for line in found for pair in re.findall(r"\b([A-Z])=(\S+)", line) if runs(line) == "=")
    lines = (re.sub(r"\$([A-Z])\b", lambda name: values[name[1]], line) for line in found if runs(line) != "=")
    return [Command(page, line) for line in lines]


def joined(block: str) -> list[str]:
    """Its lines, without comments and empty ones; one that ends in \\ goes on in the next."""
    return [line for line in map(str.strip, block.replace("\\\n", " ").splitlines()) if line and line[0] != "#"]


def runs(line: str) -> str:
    """What a line starts, "=" for the assignment of names, "" if it is no command."""
    first = re.match(r"(?:[A-Z_]{2,}=\S+ )*(python|deepspeed|torchrun|sbatch|make|pip) [^=|]", line)
    return first[1] if first else "=" if re.match(r"[A-Z]=", line) else ""


@functools.cache
def help_of(script: str, *words: str) -> str:
    """What `--help` prints."""
    with job(1, script, *words, "--help") as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(command: Command) -> None:
    """The script is there, knows the flags, and the config loads with these settings; a module, an extra, a target is there."""
    words = shlex.split(command.line, comments=True)
    assert subprocess.run(["bash", "-n", "-c", command.line], capture_output=True).returncode == 0, command
    while "=" in words[0]:  # SCRIPT=... before the command
        words.pop(0)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0, command
    elif words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", command.line)
        known = (ROOT / "setup.py").read_text()
        names = [name for some in extras for name in some.split(",")]
        assert words[1] == "install" and all(f'"{name}": [' in known for name in names), command
    elif words[:2] == ["python", "-c"]:
        compile(words[2], str(command), "exec")
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), command
        if words[2].startswith("clip4vla."):
            check_flags(command, [words[2].replace(".", "/") + "/__main__.py", *words[3:]])
    else:
        script = next((i for i, word in enumerate(words) if word.endswith((".py", ".sbatch"))), None)
        assert script is not None, f"{command}: what is this?"
        check_flags(command, words[script:])
        check_settings(command, words[script:])


def check_flags(command: Command, words: list[str]) -> None:
    """--help of the script, or of the part of it that its first word names, knows each."""
    if words[0].endswith(".sbatch"):
        text = (ROOT / words[0]).read_text()
        words = [re.search(r"\w+/\w+\.py", text)[0], *words[1:]]
    assert (ROOT / words[0]).is_file(), command
    flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    part = words[1:2] if words[0] in ("launch/bench.py", "clip4vla/search/__main__.py") else []
    for flag in flags if not any(map(PLACEHOLDER.fullmatch, part)) else ():
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(words[0], *part)), (str(command), flag)


def check_settings(command: Command, words: list[str]) -> None:
    """The config file exists and loads with the KEY=VALUE words, names and types checked."""
    script, *rest = words
    if script in (
        "launch/bench.py",
        "launch/export.py",
        "launch/report.py",
        "launch/gpu_check.py",
        "data_prep/check.py",
    ):
        return
    kinds = {
        "data_prep/shard.py": DataConfig,
        "launch/slurm/shard.sbatch": DataConfig,
        "launch/convert.py": ImportConfig,
    }
    kind = kinds.get(script, RunConfig)
    given = [re.sub(r"^(pretrain|finetune)\.", "", word) for word in rest if "=" in word and word[0] != "-"]
    configs = [word for word in rest if word.endswith(".yaml") and "=" not in word]
    for config in configs or [None]:
        load(kind, config and ROOT / config, given)


@pytest.mark.parametrize("page", [name for name in PAGES if name != "extending.md"])  # whose commands run, below
def test_commands_of_the_page_parse(page):
    for command in commands(page):
        check(command)


def test_settings_named_in_the_pages_are_there():
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    for page, text in PAGES.items():
        named = re.findall(rf"`((?:{sections})\.(?!safetensors|onnx)[a-z]\w*)(?=[`=])", text)
        assert not set(named) - KEYS, (page, set(named) - KEYS)


def test_links_between_pages_and_to_files_resolve():
    for page, text in PAGES.items():
        for place, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            file = (ROOT / "docs" / place) if place else ROOT / "docs" / page
            assert file.exists(), (page, place)
            if anchor:
                titles = re.findall(r"^#+ (.+)", file.read_text(), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in anchors, (page, place, anchor)


def test_files_named_in_the_pages_are_there():
    for page, text in PAGES.items():
        if page == "extending.md":
            text = re.sub(r"\S*fsdkaggle\S*", "", text)
        for name in re.findall(r"(?<![\w/.<{])(?:clip4vla|data_prep|launch|configs|tests|docs)/[\w/.-]+\w\b", text):
            assert (ROOT / name).exists() or list(ROOT.glob(name + "*")), (page, name)


def test_the_readmes_tree_names_every_folder_and_its_list_every_page():
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## Where things are") :]
    tree = tree[: tree.index("```", tree.index("```") + 3)]
    folders = {
        path.parent for top in ("clip4vla", "data_prep", "launch", "tests") for path in (ROOT / top).rglob("*.py")
    }
    assert len(tree.splitlines()) <= 34 and not [folder.name for folder in folders if f"{folder.name}/" not in tree]
    assert not [page for page in PAGES if f"docs/{page}" not in readme]


def test_python_in_the_pages_compiles():
    for page, text in PAGES.items():
        for block in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
            compile(block, page, "exec")


# Journeys


def checkout(folder: Path) -> Path:
    """A copy of this repository as it stands, without data."""
    kept = ("clip4vla", "data_prep", "launch", "configs", "docs", "setup.py")
    folder.mkdir()
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests/sample").symlink_to(ROOT / "tests/sample")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    # forks have the installed package on their path: this one's folder goes before it
    here = "import runpy, sys\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    (folder / "here.py").write_text(here)
    return folder


def do(folder: Path, words: list[str], ranks: int = 1) -> str:
    """A script of the copy; what it prints."""
    with Job(ranks, ["here.py", *words], {"OMP_NUM_THREADS": "1"}, free_port(), folder) as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    return done.stdout


def follow(folder: Path, page: str, smaller: dict[str, str], only: str = "") -> dict[str, str]:
    """Run the commands of a page's blocks that hold `only`, in order, each with the words that make it small; what they print."""
    printed = {}
    for command in commands(page, blocks_only=True):
        words = shlex.split(command.line, comments=True)
        if only not in command.line or PLACEHOLDER.fullmatch(words[-1]):
            continue
        extra = shlex.split(next((words for part, words in smaller.items() if part in command.line), ""))
        if words[1] == "-c":
            done = subprocess.run([shutil.which("python3"), *words[1:]], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            printed[command.line] = done.stdout
            continue
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ranks = int(words[words.index("--num_accelerators") + 1]) if words[0] == "deepspeed" else 1
        printed[command.line] = do(folder, [*words[first:], *extra], ranks)
    return printed


SMALL = "model.clip=tiny.json train.max_steps=2 train.log_every=1 track.wandb=off train.precision=fp32 data.decode_threads=1"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A copy in which the commands of data.md on the sample have run; what each printed."""
    folder = checkout(tmp_path_factory.mktemp("docs") / "clip4vla")
    smaller = {"launch/pretrain.py": SMALL, "embed.py": "model.clip=tiny.json"}
    printed = follow(folder, "data.md", smaller, "sample") | follow(folder, "data.md", {}, "data/parts --repair")
    return folder, printed


def test_data_preparation_on_the_sample_is_as_its_page_says(sample):
    folder, printed = sample
    assert "core hours" in printed["python data_prep/shard.py configs/data/sample.yaml --dry-run"]
    assert (folder / "data/sample.html").is_file()
    assert (folder / "data/sample/speech_fr/train/clip/index.json").is_file()
    tars = [*(folder / "data/parts/speech_fr/train").glob("*.tar")]
    assert len(tars) == 3 and all("page:" in text for line, text in printed.items() if "check.py" in line)


def test_performance_on_the_sample_is_as_its_page_says(sample):
    folder, _ = sample
    (rates,) = follow(folder, "performance.md", {}, "runs/sample_clip").values()
    assert set(ast.literal_eval(rates)) == {"clips_per_s", "data_wait_fraction", "tflops", "memory_gib"}
    runs = follow(folder, "performance.md", {"--dry-run": f"{SMALL} init_from=runs/sample_clip"}, "--dry-run").values()
    assert len(runs) == 2 and all("nothing was written" in run and "GiB a rank" in run for run in runs)


def guide(name: str, folder: Path) -> Path:
    """A copy with the diffs of one guide of extending.md applied."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGES["extending.md"], re.S | re.M)[1]
    patch = "".join(re.findall(r"^```diff\n(.*?)^```", section, re.S | re.M))
    copy = checkout(folder)
    command = ["git", "apply", "-C1", "-"]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=copy, input=patch, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return copy


def test_the_guide_to_a_data_set_gives_shards(tmp_path):
    copy = guide("A data set", tmp_path / "copy")
    media = copy / "data/fsdkaggle/media"
    media.mkdir(parents=True)
    sounds = sorted((ROOT / "tests/sample").rglob("*.ogg"))[:2]
    shutil.copy(sounds[0], media / "00044347.ogg")
    shutil.copy(sounds[1], media / "00326459.ogg")
    head = "fname,label,manually_verified,freesound_id,license\n"
    (media.parent / "train_post_competition.csv").write_text(
        f"{head}00044347.wav,Hi-hat,0,28739,x\n001ca53d.wav,Saxophone,1,358827,x\n002d256b.wav,,0,1,x\n"
    )
    (media.parent / "test_post_competition_scoring_clips.csv").write_text(f"{head}00326459.wav,Bass_drum,1,2,x\n")
    printed = follow(
        copy, "extending.md", {"shard.py": "max_failed_fraction=0.3", "check.py": "--decode all"}, "fsdkaggle"
    )
    assert len(printed) == 3 and "fsdkaggle/train: 1 clips found" in [*printed.values()][0]
    skipped = [json.loads(line) for line in (copy / "data/shards/fsdkaggle/skipped.jsonl").read_text().splitlines()]
    assert {item["why"]: item["where"] for item in skipped} == {
        "missing": "001ca53d",
        "malformed": "train_post_competition.csv:4",
    }
    counts = json.loads((copy / "data/shards/fsdkaggle/fsdkaggle/test/index.json").read_text())["counts"]
    assert (counts["samples"], counts["with_audio"]) == (1, 1)


def test_the_guide_to_a_fusion_gives_a_head_that_learns(sample, tmp_path):
    from safetensors.torch import load_file

    copy = guide("A fusion head", tmp_path / "copy")
    (copy / "data").symlink_to(sample[0] / "data")
    few = f"{SMALL} init_from=[] train.batch_size=12 eval.every_steps=0 eval.best_metric= eval.bootstrap=0"
    few += " data.train=data/sample/speech_fr/train data.val=[] data.test=data/sample/speech_fr/train"
    plain = few.split() + ["configs/finetune/stamps_retrieval.yaml", "model.head=global_global"]
    for script in ("launch/finetune_retrieval.py", "launch/evaluate.py"):
        do(copy, [script, *plain, "run_dir=runs/stamps_retrieval"])
    printed = follow(copy, "extending.md", {"stamps_retrieval.yaml": few}, "weighted")
    assert "runs/weighted (weighted)" in [*printed.values()][-1]
    weights = load_file(copy / "runs/weighted/checkpoints/step-00000002/model.safetensors")["head.weights"]
    assert weights[0] == 0 and (weights[1:] != 0).all()
    first = [trace(copy / "runs" / name)[1] for name in ("weighted", "stamps_retrieval")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # it starts as the mean


def test_the_guide_to_a_loss_gives_its_value_on_any_ranks(sample, tmp_path):
    copy = guide("A loss", tmp_path / "copy")
    (copy / "data").symlink_to(sample[0] / "data")
    few = f"{SMALL} init_from=scratch train.batch_size=12 data.precomputed_embeddings=off"
    few += " data.train=[data/sample/speech_fr/train,data/sample/sounds/train]"
    printed = follow(copy, "extending.md", {"pretrain.py": few}, "uniform")
    assert len(printed) == 1
    words = ["configs/pretrain/sample.yaml", "loss.uniform=0.1", "run_dir=runs/one", *few.split()]
    do(copy, ["launch/pretrain.py", *words])
    one, two = (
        [json.loads(line) for line in (copy / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "uniform")
    )
    for row, other in zip(one, two, strict=True):
        terms = sum(row[f"loss/{name}"] for name in ("at", "av", "aa"))
        assert row["loss/uniform"] == pytest.approx(row["uniformity"], rel=1e-5)  # as meter.py computes it
        assert row["loss"] == pytest.approx(terms + 0.1 * row["loss/uniform"], rel=1e-6)
        for name in ("loss", "loss/uniform", "grad_norm"):  # two ranks: the value, and through step 2 the gradient
            assert other[name] == pytest.approx(row[name], rel=1e-4), name


def test_data_sets_of_the_page_are_those_of_the_settings():
    table = re.findall(r"^\| `(\w+)` \| ", PAGES["data.md"].partition("| `dataset` |")[2], re.M)
    choices = next(kind for key, kind, _ in describe(DataConfig) if key == "dataset").partition(" = ")[0].split("|")
    assert sorted(table) == sorted(choices)
    assert all(yaml.safe_load(path.read_text())["dataset"] in table for path in (ROOT / "configs/data").glob("*.yaml"))
