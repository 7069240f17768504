"""Which device a rank computes on, what is refused, and how payloads travel then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disco.errors import InputError
from disco.runtime import RankProcesses, devices, transports
from disco.runtime.devices import device_of_rank, devices_of_ranks
from disco.runtime.peers import Peers
from disco.runtime.places import Options, place_among
from disco.runtime.streams import check_nccl_stream
from disco.runtime.token import make_token
from disco.runtime.transports import choose_carrier, why_no_nccl
from tests.cli.conftest import Command, disco  # noqa: F401 - a fixture

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(transports.dist, "is_nccl_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
def test_ranks_take_gpus_in_turns_or_the_given_one() -> None:
    assert [str(d) for d in devices_of_ranks("cuda", 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [str(d) for d in devices_of_ranks("cuda:1", 2)] == ["cuda:1", "cuda:1"]
    assert devices_of_ranks("cpu", 2) == (CPU, CPU)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1", "CUDA"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"was given: give cpu, cuda .* or cuda:N"):
        device_of_rank(name, 0)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"'cuda:2' was given; this machine has cuda:0 to cuda:1"):
        device_of_rank("cuda:2", 0)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_cuda_nothing_is_started(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, why in (("13.0", "finds no GPU and driver"), (None, "built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(InputError, match=why):
            RankProcesses(tiny_folder, device=name)


@pytest.mark.usefixtures("no_gpu")
def test_the_command_says_so_in_one_line(
    disco: Command,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    done = disco("run", tiny_folder, "--device", "cuda", "--input", tmp_path)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "device 'cuda' was given" in line and "compute with cpu" in line


@pytest.mark.usefixtures("no_gpu")
def test_a_member_says_so_before_it_listens(
    disco: Command,  # noqa: F811
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    make_token(tmp_path / "token")
    (tmp_path / "peers.yaml").write_text("peers:\n  - 127.0.0.1:1\n  - 127.0.0.1:2\n")
    options = ("--peers", tmp_path / "peers.yaml", "--token-file", tmp_path / "token")
    done = disco("worker", tiny_folder, "--rank", "1", "--device", "cuda", *options)
    assert done.code == 2 and "device 'cuda' was given" in done.err


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_given_time_to_compile(tiny_folder: Path) -> None:
    assert RankProcesses(tiny_folder).silence_s == 2.0
    assert RankProcesses(tiny_folder, device="cuda:0").silence_s == 30.0
    assert RankProcesses(tiny_folder, device="cuda:0", silence_s=1.5).silence_s == 1.5
    for seconds in (0.0, -1.0, 0.25, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"above the 0.25 between signs of life, given"):
            RankProcesses(tiny_folder, silence_s=seconds)
        if not seconds > 0 or seconds > 1:
            for name in ("meeting_s", "deadline_s"):
                with pytest.raises(InputError, match=f"{name} must be a number of seconds above 0"):
                    Options(**{name: seconds})


@pytest.mark.usefixtures("two_gpus")
def test_going_on_without_ranks_is_for_the_cpu(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"'degrade' was given with device 'cuda'"):
        RankProcesses(tiny_folder, device="cuda", on_peer_loss="degrade")
    with pytest.raises(InputError, match=r"'degrade' was given with device 'cuda:1'"):
        Options(device="cuda:1", on_peer_loss="degrade")


@pytest.mark.usefixtures("two_gpus")
def test_peers_of_one_machine_take_its_gpus_in_turns(tmp_path: Path) -> None:
    make_token(tmp_path / "token")
    addresses = (("a", 1), ("b", 1), ("a", 2), ("a", 3))
    options = Options(device="cuda", token_file=tmp_path / "token")
    places = [place_among(Peers(addresses), rank, options) for rank in range(4)]
    assert [str(place.device) for place in places] == ["cuda:0", "cuda:0", "cuda:1", "cuda:0"]
    assert {place.transport_text for place in places} == {"tcp through pinned host memory"}


@pytest.mark.usefixtures("two_gpus")
def test_payloads_travel_by_nccl_where_each_rank_has_a_gpu() -> None:
    own, shared = devices_of_ranks("cuda", 2), devices_of_ranks("cuda", 3)
    assert choose_carrier("auto", own).nccl and choose_carrier("torch", own).nccl
    assert choose_carrier("auto", own).text == "torch (NCCL)"
    assert choose_carrier("tcp", own).text == "tcp through pinned host memory"
    why = "ranks 0 and 2 share cuda:0, which NCCL refuses"
    for name, named in (("auto", "tcp"), ("torch", "torch (gloo)")):
        carrier = choose_carrier(name, shared)
        assert not carrier.nccl
        assert carrier.text == f"{named} through pinned host memory ({why})"
    for name in ("tcp", "torch"):
        assert choose_carrier(name, (CPU, CPU)).text == name
    assert choose_carrier("auto", (CPU, CPU)).text == "tcp"


def test_why_not_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports.dist, "is_nccl_available", lambda: False)
    assert why_no_nccl(["GPU a", "GPU b"]) == "this torch is built without NCCL"
    assert why_no_nccl(["GPU a", "cpu"]) == (
        "rank 1 computes on the CPU, and NCCL carries GPU memory"
    )
    assert why_no_nccl(["GPU a", "GPU b", "GPU a"]) == (
        "ranks 0 and 2 share GPU a, which NCCL refuses"
    )


def test_over_nccl_one_request_at_a_time() -> None:
    check_nccl_stream(1, nccl=True)
    check_nccl_stream(4, nccl=False)
    with pytest.raises(InputError, match="2 requests in flight were asked for over NCCL"):
        check_nccl_stream(2, nccl=True)


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.free_memory_on(CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = devices.free_memory_on(torch.device("cuda", 1))
    assert found is not None
    assert [(f.num_bytes, f.limit) for f in found] == [(5, "free on cuda:1 (a GPU)")]
