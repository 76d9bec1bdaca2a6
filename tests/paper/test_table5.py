"""launch/ablate.py on the sample: Table 5's rows, Figure 4, the type token, costs; what is there is not done again."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from forks import ROOT
from running import evaluation, run
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from clip4vla.errors import UserError
from clip4vla.evaluation.features import Features
from clip4vla.paper import cost, figure4, type_token
from clip4vla.paper import table5 as ablation

CODE = """import gc, runpy, sys
runpy.run_path("launch/ablate.py", run_name="__main__")
gc.collect()
from deepspeed.runtime.engine import DeepSpeedEngine
print("engines left:", sum(isinstance(x, DeepSpeedEngine) for x in gc.get_objects()))
"""


@pytest.fixture(scope="module")
def table5(tiny, sample_shards, tmp_path_factory):
    """(finished ablation's folder, the words that made it, what it said)."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "counted.py").write_text(CODE)
    config, *words = tiny
    both = ", ".join(f"{sample_shards}/{source}" for source in ("speech_fr/test", "sounds/test"))
    words += [f"data.test=[{both}]", "train.max_steps=2", "eval.bootstrap=0", "eval.report_queries=1"]
    words = ["table5", config, "configs/finetune/stamps_retrieval.yaml", *words, "finetune.eval.every_steps=0",
             "finetune.eval.best_metric=", f"finetune.data.train={sample_shards}/speech_fr/train"]  # fmt: skip
    words += ["--seeds", 1, "--out", folder / "out"]
    done = run(folder / "counted.py", *words)
    assert done.returncode == 0, done.stderr
    return folder / "out", words, done.stdout


def test_a_run_for_each_row_and_seed_as_the_paper_says(table5):
    out, _, said = table5
    assert "engines left: 0" in said
    settings = {f.parent.relative_to(out).as_posix(): yaml.safe_load(f.read_text()) for f in out.rglob("config.yaml")}
    assert len(settings) == 5 + 3 and len({s["run_dir"] for s in settings.values()}) == 8
    for row in ablation.ROWS:
        tuned = settings[f"{row.name}/seed-1/finetune"]
        assert (tuned["seed"], tuned["model"]["modalities"], tuned["loss"]["tm"], tuned["loss"]["at"]) == (1, "a", 1, 0)
        assert tuned["model"]["audio_init"] == ("scratch" if row.name == "scratch" else "vision")
        assert (tuned["model"]["audio_type"] == "none") == (row.name != "type")
        before = settings.get(f"{row.name}/seed-1/pretrain")
        assert (before is None) == (row.name in ("scratch", "initial"))
        if before:
            assert before["loss"]["at"] and before["loss"]["av"] and bool(before["loss"]["aa"]) == (row.name != "inter")
            assert (before["model"]["pretrain_audio_type"] == "none") == (row.name != "type")
            assert tuned["init_from"] == [str(out / row.name / "seed-1/pretrain")]


def test_the_table_is_that_of_the_runs(table5):
    out, _, said = table5
    names = [row.name for row in ablation.ROWS]
    found = [json.loads((out / row / "seed-1/finetune/eval/test/metrics.json").read_text()) for row in names]
    lines = [line.strip(" |").split(" | ") for line in (out / "table5.md").read_text().splitlines()[2:]]
    assert [line[2] for line in lines] == [f"{metrics['text_to_video']['R@5']:.1f}" for metrics in found]
    assert [line[-1] for line in lines] == ["2.5", "3.6", "6.8", "10.5", "10.6"]
    assert (out / "table5.md").read_text() in said
    rows = list(csv.DictReader((out / "table5.csv").open()))
    assert [(row["row"], row["seed"]) for row in rows] == [(name, "1") for name in names]
    assert [float(row["R@5"]) for row in rows] == [metrics["text_to_video"]["R@5"] for metrics in found]


def test_several_seeds_are_mean_and_spread():
    score = {"R@1": 1.0, "R@5": 2.0, "R@10": 3.0, "MedR": 4.0}
    found = {row.name: {} for row in ablation.ROWS}
    found["inter"] = {seed: score | {"R@5": value} for seed, value in enumerate((10.0, 11.0, 15.0))}
    (line,) = ablation.table(found).splitlines()[2:]
    assert (
        line
        == f"| + inter-modal | 1.0 ± 0.0 | 12.0 ± {np.std([10, 11, 15], ddof=1):.1f} | 3.0 ± 0.0 | 4.0 ± 0.0 | 3 | 6.8 |"
    )


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(table5):
    out, words, _ = table5
    (out / "type/seed-1/finetune/report.html").unlink()  # killed before the end
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    done = run("launch/ablate.py", *words)
    assert done.returncode == 0 and (out / "table5.md").read_text() in done.stdout, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert (out / "type/seed-1/finetune/report.html").is_file()
    done = run("launch/ablate.py", *words, "pretrain.train.lr=0.5")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "pretrain.train.lr=0.001, not 0.5: name another folder" in line


def test_a_checkpoint_with_an_audio_tower_is_no_start(table5):
    out, words, _ = table5
    done = run("launch/ablate.py", *words[:-1], out / "other", f"pretrain.init_from={out}/type/seed-1/pretrain")
    assert done.returncode == 2 and "must have no trained audio tower" in done.stderr


def test_figure4_has_the_two_tokens_at_its_ends(table5, tmp_path):
    """r = 0 and 1 are what evaluate.py gives for vb and nb."""
    pretrained = table5[0] / "type/seed-1/pretrain"
    done = run("launch/ablate.py", "figure4", pretrained, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    assert len(rows) == 2 * 3 * 12  # splits, (all, speech, sounds), ratios and both
    words = [f"{pretrained}/config.yaml", "eval.audio_types=[vb, nb, both]", "eval.bootstrap=0"]
    tested = run("launch/evaluate.py", *words)
    assert tested.returncode == 0, tested.stderr
    made = evaluation(pretrained, tested.stdout)
    for r, file in (("0", "metrics.json"), ("1", "metrics-nb.json"), ("both", "metrics-both.json")):
        metrics = json.loads((made / file).read_text())["text_to_audio"]
        row = next(
            row
            for row in rows
            if (row["run"], row["split"], row["data set"], row["r"]) == (str(pretrained), "data.test", "all", r)
        )
        assert {name: float(row[name]) for name in ("R@1", "R@5", "MeanR")} == pytest.approx(
            {name: metrics[name] for name in ("R@1", "R@5", "MeanR")}
        )
    assert (tmp_path / "figure4.png").read_bytes()[:4] == b"\x89PNG" and "by data.val" in done.stdout


def rows_of(values, data="all", kind="all"):
    same = {"split": "data.test", "data set": data, "audio type": kind, "n_queries": 5, "n_gallery": 7}
    pairs = zip([*figure4.RATIOS, "both"], [*values, 99], strict=True)
    return [same | {"r": r, "R@1": v, "R@5": 2 * v, "R@10": 3 * v} for r, v in pairs]


def test_the_ratio_is_that_of_the_best_sum_over_everything():
    one = rows_of([1, 1, 8, 1, 1, 1, 1, 8, 1, 1, 1]) + rows_of([90] + [0] * 10, "speech", "vb")
    assert figure4.best_ratio(one) == "0.7"  # of equal ones the nearer to the middle; "both" is no ratio
    assert figure4.best_ratio(rows_of([90] + [0] * 10, "speech", "vb")) == "0"


def test_figure4_draws_mean_and_spread_of_the_runs():
    found = {"a": rows_of(range(11)), "b": rows_of(range(2, 13))}
    (axes,) = figure4.figure(found, {"a": "0.3", "b": "0.3"}).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["R@5"].get_ydata().tolist() == [2 * (i + 1) for i in range(11)]
    assert lines["R@1"].get_xdata().tolist() == pytest.approx(np.arange(11) / 10)
    assert sum(list(line.get_xdata()) == [0.3, 0.3] for line in axes.lines) == 1


def test_types_of_a_run(table5):
    """Everything is written, and every clip gets a probability."""
    folder = table5[0] / "type/seed-1/pretrain"
    done = run("launch/ablate.py", "audio-types", folder)
    assert done.returncode == 0 and "speech or sound, from both" in done.stdout, done.stderr
    analysis = json.loads((folder / "audio_types/audio_types.json").read_text())
    assert len(analysis["probes"]) == 4
    assert set(analysis["queries"]) == {"data", "vb", "nb", "both"}
    verbal = list(csv.DictReader((folder / "audio_types/audio_types.csv").open()))
    assert {row["audio_type"] for row in verbal} == {"vb", "nb"} and all(
        0 <= float(row["verbal"]) <= 1 for row in verbal
    )
    assert (folder / "audio_types/audio_types.png").read_bytes()[:4] == b"\x89PNG"


def test_probes_find_what_is_planted():
    """Types that only [NB] shows, and tokens that shift every clip alike."""
    rng = np.random.default_rng(0)

    def made(n):
        kinds = ["nb" if i % 4 == 0 else "vb" for i in range(n)]
        clips = [{"audio_type": kind, "group": str(i)} for i, kind in enumerate(kinds)]
        x = {token: rng.normal(size=(n, 6)) for token in ("vb", "nb")}
        x["nb"][:, 0] += [8 * (kind == "nb") for kind in kinds]
        x["vb"][:, 1] += 8
        return {token: Features([*range(n)], clips, {"a": torch.from_numpy(v).float()}) for token, v in x.items()}

    test = made(80)
    judged, verbal = type_token._probes(made(200), test, 0)
    assert judged["vb or nb token, same clips"]["auc"] > 0.99 and judged["speech or sound, from both"]["auc"] > 0.99
    assert (
        judged["speech or sound, all under nb"]["auc"] > 0.99
        and 0.3 < judged["speech or sound, all under vb"]["auc"] < 0.7
    )
    speech = torch.tensor([clip["audio_type"] == "vb" for clip in test["vb"].clips])
    assert verbal[speech].min() > verbal[~speech].max()


def test_judges_are_scikit_learns():
    rng = np.random.default_rng(0)
    right, score = rng.integers(0, 2, 200), rng.integers(0, 20, 200) / 20
    score[right == 1] += 0.2
    ours = type_token.auc(torch.from_numpy(score), torch.from_numpy(right))
    assert ours == pytest.approx(roc_auc_score(right, score))
    guess = score > 0.6
    assert type_token.balanced(torch.from_numpy(guess), torch.from_numpy(right)) == pytest.approx(
        100 * balanced_accuracy_score(right, guess)
    )


def test_cost_is_counted_from_the_log(table5, tmp_path):
    """Two logging rows on other devices; rows between them carry no rates."""
    rows = [
        {"step": 1, "samples": 100},
        {"step": 2, "samples": 200, "clips_per_s": 10.0, "tflops": 2.0, "ranks": 2, "cores": 4},
        {"step": 3, "samples": 300, "clips_per_s": 50.0, "tflops": 1.0, "ranks": 1, "gpus": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = table5[0] / "type/seed-1/pretrain"
    with pytest.raises(UserError, match="no run with metrics.jsonl and a checkpoint"):
        cost.of_run(str(tmp_path))
    (tmp_path / "checkpoints").symlink_to(source / "checkpoints")
    found = cost.of_run(str(tmp_path))
    assert found["clips"] == 300 and found["flops"] == pytest.approx(20 * 2 * 2e12 + 2 * 1e12)
    assert found["hours"] == pytest.approx({"cores": 20 * 4 / 3600, "gpus": 2 / 3600})
    assert 0 < found["trained"] < found["parameters"]
    table = cost.table([str(tmp_path)])
    assert "1,152 GPU h (48 V100 days)" in table and "0.0222 CPU core h + 0.000556 GPU h" in table
    real = cost.of_run(str(source))
    assert real["clips"] == 24 and real["hours"]["cores"] > 0 and real["flops"] > 0


BOTH = ["table5", "configs/pretrain/stamps.yaml", "configs/finetune/stamps_retrieval.yaml"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["table5", "configs/pretrain/stamps.yaml"], "two config files"),
        ([*BOTH, "pretrain.loss.aa=0"], "loss.aa is 0, and + intra-modal is to add it"),
        (["audio-types", "nowhere"], "nowhere: no run there"),
        (["cost", "nowhere"], "nowhere: no run with metrics.jsonl"),
        (["figure4", "nowhere", "train.lr=1"], "nowhere: no run there"),
    ],
)
def test_mistakes_are_one_line(words, said, monkeypatch, capsys):
    import runpy

    monkeypatch.setattr("sys.argv", ["launch/ablate.py", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("launch/ablate.py", run_name="__main__")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and said in line
