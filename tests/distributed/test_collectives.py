"""collectives.py and network.py before the ranks join: threads, gloo's interface and connections; time-outs of groups."""

import json
import os
import socket

import pytest
import torch
from running import ranks

from clip4vla.distributed import collectives, network

CHOICES = ("GLOO_SOCKET_IFNAME", "TORCH_GLOO_LAZY_INIT")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing is chosen yet; what the code sets is gone after the test."""
    for name in (*CHOICES, *collectives.SIZES, "SLURM_STEP_NUM_NODES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "8")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_rank_takes_its_share_of_the_cores_with_and_without_a_gpu(monkeypatch, gpus):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert collectives._device(1).type == ("cuda" if gpus else "cpu")
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # torch has read it: not to be overruled
    torch.set_num_threads(2)
    collectives._device(1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "names, several",
    [
        ({}, False),
        ({"LOCAL_WORLD_SIZE": "8"}, False),
        ({"LOCAL_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "1"}, False),
    ],
)
def test_whether_there_are_several_hosts_is_what_the_launcher_says(monkeypatch, names, several):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert collectives._several_hosts() is several


def chosen(address="10.0.0.1", ranks=2, several=True) -> list[str | None]:
    network.prepare_gloo(address, ranks, several)
    return [os.environ.get(name) for name in CHOICES]


def test_gloo_takes_the_interface_on_the_route_to_rank_0(monkeypatch):
    monkeypatch.setattr(network, "route_to", {"10.0.0.1": "10.0.0.7", "rank0": "127.0.1.1", "gone": ""}.get)
    monkeypatch.setattr(network, "interface_of", {"10.0.0.7": "ib0", "127.0.1.1": "lo"}.get)
    assert chosen(several=False) == chosen("rank0") == chosen("gone") == [None, None]
    assert chosen() == ["ib0", None]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert chosen() == ["eth7", None]  # the user's


def test_addresses_lead_to_interfaces():
    assert network.route_to("127.0.0.1") == "127.0.0.1" and network.interface_of("127.0.0.1") == "lo"
    assert network.route_to("no.such.host.invalid") == network.interface_of("203.0.113.9") == ""
    if socket.has_dualstack_ipv6() and network.route_to("::1"):
        assert network.interface_of("::1") == "lo"


def test_many_ranks_connect_when_they_need_to(monkeypatch):
    assert chosen(ranks=network.MANY - 1, several=False) == [None, None]
    assert chosen(ranks=network.MANY, several=False) == [None, "1"]
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "0")
    assert chosen(ranks=network.MANY, several=False) == [None, "0"]


def test_gloo_works_over_a_chosen_interface_and_with_connections_made_late(tmp_path):
    """And DeepSpeed's own process group gives up a minute after train.hang_timeout_minutes, as the ranks' first one."""
    env = dict(zip(CHOICES, ("lo", "1"), strict=True))
    done = ranks(3, "tests/helpers/group_timeouts.py", tmp_path / "out.json", "7", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {"sum": 6, "minutes": [8, 8]}
