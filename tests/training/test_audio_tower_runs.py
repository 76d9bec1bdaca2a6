"""Training with an audio tower of its own."""

import pytest
from running import ranks, trace


def test_an_audio_tower_of_its_own_trains_the_same_in_parts(tiny, zero3, tmp_path):
    words, traces = [*tiny, "model.audio_tower=test_vit", "model.audio_span=clip", "train.max_steps=2"], []
    pieces = ["train.activation_checkpointing=true", "--deepspeed_config", zero3]
    for number, (count, more) in enumerate([(1, []), (2, pieces)]):
        done = ranks(count, "launch/pretrain.py", *words, f"run_dir={tmp_path / str(number)}", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        traces.append(trace(tmp_path / str(number)))
    for step, losses in traces[0].items():
        assert traces[1][step] == pytest.approx(losses, rel=1e-5)
