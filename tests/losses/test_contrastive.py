"""losses.py against float64 brute force written from equations (1)-(5), on 1 to 4 ranks, with missing modalities."""

import os
import weakref

import forks
import pytest
import torch
import torch.multiprocessing as mp
from brute_force import brute_force
from running import free_port

from clip4vla.config import LossConfig
from clip4vla.data.batch import Labels
from clip4vla.distributed import collectives
from clip4vla.losses import contrastive
from clip4vla.losses.contrastive import Term, info_nce, multi_info_nce, nce_from_scores
from clip4vla.losses.objective import compute_losses

N, D = 12, 16


def features(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(4, N, D, generator=generator, dtype=torch.float64), dim=-1)
    return [row.to(dtype) for row in x]


CASES = {
    "plain": {},
    "intra": {"intra": True},
    "missing": {"valid": torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool()},
    "missing intra": {"valid": torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1]).bool(), "intra": True},
    "groups": {"group": torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 0]), "intra": True},
    "one way": {"valid": torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool(), "one_way": True},
    "one row": {"valid": torch.arange(N) == 5, "intra": True},
    "none": {"valid": torch.zeros(N).bool()},
}


CASES |= {f"scored {name}": {**case, "scored": True} for name, case in CASES.items() if "intra" not in case}


def expected(case):
    a, b = (x.clone().requires_grad_() for x in features()[:2])
    scale = torch.tensor([20.0], dtype=torch.float64, requires_grad=True)
    kwargs = {"valid": torch.ones(N).bool()} | CASES[case]
    loss = brute_force(a, b, scale[0], **kwargs)
    loss.backward()
    zero = torch.zeros_like
    return [loss.detach(), *(x.grad if x.grad is not None else zero(x) for x in (a, b, scale))]


def ours(case, dtype, rank=0, world=1):
    """This rank's value and gradients by its own rows and by the scale."""
    rows = slice(rank * N // world, (rank + 1) * N // world)
    a, b = (x[rows].clone().requires_grad_() for x in features(dtype)[:2])
    scale = torch.tensor([20.0], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    kwargs = {"valid": torch.ones(N).bool()} | CASES[case]
    kwargs = {name: value[rows] if torch.is_tensor(value) else value for name, value in kwargs.items()}
    if kwargs.pop("scored", False):  # as a head that knows how to compare each of its captions with all clips
        loss = nce_from_scores(a @ collectives.all_gather_with_grad(b).T, scale, **kwargs)
    else:
        group = kwargs.pop("group", None)
        (loss,) = multi_info_nce([a, b], scale, [Term(0, 1, **kwargs)], group)
    loss.backward()
    return loss.detach(), a.grad, b.grad, scale.grad


def close(got, want, tolerance):
    error = (got.double() - want).abs().max()
    assert error <= tolerance * max(1e-3, want.abs().max()), f"{error} at scale {want.abs().max()}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_brute_force_in_one_process(case, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(contrastive.TILE, "cpu", 20)  # tiles of 2 x 10
    for got, want in zip(ours(case, dtype), expected(case), strict=True):
        close(got, want, tolerance)


def test_bf16_features_lose_nothing_in_the_loss_itself():
    a, b = features(torch.bfloat16)[:2]
    want = brute_force(a.double(), b.double(), 20.0, torch.ones(N).bool(), intra=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(a, b, torch.tensor([20.0]), torch.ones(N).bool(), intra=True)
    close(got, want, 1e-5)


def test_compiled_it_is_the_same():
    a, b = (x.requires_grad_() for x in features(torch.float32)[:2])
    scale, valid = torch.tensor([20.0]), torch.arange(N) != 3
    found = []
    for loss in (info_nce, torch.compile(info_nce, backend="aot_eager")):
        value = loss(a, b, scale, valid, intra=True)
        found.append((value, *torch.autograd.grad(value, (a, b))))
    for got, want in zip(*found, strict=True):
        close(got, want.double(), 1e-5)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_give_the_full_batch_gradient(world, tmp_path):
    """Averaged over ranks, as the engine does, value and gradients equal one process with all rows."""
    forks.start_server()
    mp.start_processes(_rank, (world, free_port(), str(tmp_path)), nprocs=world, start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for case in CASES:
            if dtype == torch.float32 and case.endswith("one row"):
                continue  # its gradient is exactly 0, of which rounding has no relative size
            want = expected(case)
            got = [part[case, dtype] for part in parts]
            close(sum(g[0] for g in got) / world, want[0], tolerance)
            for i in (1, 2):  # gradients by own rows; the average over ranks divides them by the world size
                close(torch.cat([g[i] for g in got]) / world, want[i], tolerance)
            close(sum(g[3] for g in got) / world, want[3], tolerance)


def _rank(rank, world, port, folder):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1",
    }
    torch.set_num_threads(1)
    collectives.setup()
    cases = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.float64)]
    torch.save({(case, dtype): ours(case, dtype, rank, world) for case, dtype in cases}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_objective_is_the_weighted_sum_and_leaves_out_what_is_missing():
    text, vision, audio, masked = features()
    has_audio = torch.arange(N) % 3 > 0
    has_frames = torch.arange(N) % 4 > 0

    labels = Labels(torch.arange(N), torch.ones(N).bool(), has_frames, has_audio)
    scale = torch.tensor([10.0], dtype=torch.float64)
    named = {"text": text, "vision": vision, "audio": audio, "masked": masked, "scale": scale}
    got = compute_losses(named, labels, LossConfig(at=1, av=2, aa=0.5))
    assert set(got) == {"at", "av", "aa", "loss"}
    close(got["at"], brute_force(text, audio, 10, has_audio), 1e-9)
    close(got["av"], brute_force(vision, audio, 10, has_audio & has_frames), 1e-9)
    close(got["aa"], brute_force(audio, masked, 10, has_audio, intra=True), 1e-9)
    close(got["loss"], got["at"] + 2 * got["av"] + 0.5 * got["aa"], 1e-9)


def test_text_and_media_take_part_with_any_medium_that_is_compared():
    text, media = features()[:2]
    has_frames, has_audio = torch.arange(N) % 3 > 0, torch.arange(N) % 4 > 0
    labels = Labels(torch.arange(N) // 2, torch.arange(N) != 5, has_frames, has_audio)
    cfg = LossConfig(at=0, av=0, aa=0, tm=2, exclude_same_group=True, symmetric=False)
    scale = torch.tensor([10.0], dtype=torch.float64)
    for modalities, there in (("v", has_frames), ("a", has_audio), ("av", has_frames | has_audio)):
        want = brute_force(text, media, 10, there & labels.has_text, labels.group, one_way=True)
        for named in ({"text": text, "media": media}, {"text": text, "scores": text @ media.T}):
            got = compute_losses(named | {"scale": scale}, labels, cfg, modalities)
            close(got["loss"], 2 * want, 1e-9)


def test_finite_differences():
    inputs = [*features()[:2], torch.tensor([5.0], dtype=torch.float64)]
    valid = torch.arange(N) != 3

    def loss(inputs):
        return info_nce(*inputs, valid, intra=True)

    grads = torch.autograd.grad(loss([x.requires_grad_() for x in inputs]), inputs)
    for number, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        for place in range(x.numel()):
            step = torch.zeros_like(x)
            step.view(-1)[place] = 1e-5
            up, down = (loss([*inputs[:number], x.detach() + s, *inputs[number + 1 :]]) for s in (step, -step))
            assert float(grad.view(-1)[place]) == pytest.approx(float((up - down).detach()) / 2e-5, rel=1e-6, abs=1e-9)


def test_a_second_backward_pass_raises_and_the_first_leaves_nothing_of_the_terms(monkeypatch):
    """Or a loss that is still there would hold the gathered features, and zeros would pass for a gradient."""
    terms, term = [], contrastive._ContrastiveTerm

    def noted(*args):
        made = term(*args)
        terms.append(weakref.ref(made))
        return made

    monkeypatch.setattr(contrastive, "_ContrastiveTerm", noted)
    a, b = (x.requires_grad_() for x in features()[:2])
    loss = info_nce(a, b, torch.tensor([5.0], dtype=torch.float64), torch.ones(N, dtype=torch.bool))
    assert terms[0]() is not None
    loss.backward(retain_graph=True)
    assert terms[0]() is None
    with pytest.raises(AttributeError, match="terms"):
        loss.backward()


def test_memory_holds_tiles_not_the_matrix():
    """N = 16384: the full matrix alone would take 1.07 GB; ours may not grow by an eighth of one."""
    import resource

    n = 16384
    a, b = (torch.nn.functional.normalize(torch.randn(n, 64), dim=-1).requires_grad_() for _ in range(2))
    info_nce(a[:256], b[:256], torch.tensor([20.0]), torch.ones(256).bool()).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    info_nce(a, b, torch.tensor([20.0]), torch.ones(n).bool()).backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < n * n * 4 / 8, f"{grown / 1e6:.0f} MB"
