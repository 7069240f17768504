"""One partition over every transport, in turns: latency, processor time, bytes and bits.

    python benchmarks/transports.py --json FILE

Ranks run over loopback, one core each, so what differs is what a transport costs the ranks
themselves; what links cost is `disco bench cluster`'s affair. Every round starts each transport's
ranks anew, so that a bad minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from disco import api
from disco.bench.machine import describe_machine
from disco.runtime.joined import JoinedRank
from disco.runtime.keys import make_keys
from disco.runtime.peers import Peers
from disco.runtime.places import Options, Place, place_among, place_from_launcher
from disco.runtime.tcp import listen
from disco.runtime.token import make_token
from disco.zoo import build_model

TRANSPORTS = ("tcp", "tcp, TLS", "torch (gloo)", "mpi")
SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=30, help="timed, a round and transport")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # this process is one rank
    args = parser.parse_args()
    if args.rank_of is not None:
        rank_of(json.loads(args.rank_of))
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(args, Path(name))
    rows = [summary(transport, rounds) for transport, rounds in found.items()]
    bits = {row["outputs_sha256"] for row in rows}
    print(f"{'transport':<14}{'median ms':>10}{'p95 ms':>8}{'CPU ms a pass':>15}{'kB sent':>9}")
    for row in rows:
        print(
            f"{row['transport']:<14}{row['latency_ms_median']:>10.2f}{row['latency_ms_p95']:>8.2f}"
            f"{row['cpu_ms_per_pass']:>15.1f}{row['bytes_sent_per_pass'] / 1e3:>9.1f}"
        )
    print("all outputs are the same bits" if len(bits) == 1 else "OUTPUTS DIFFER")
    if args.json is not None:
        content = {"machine": describe_machine("mpi4py"), "rows": rows}
        content["machine"]["command"] = (
            f"python benchmarks/transports.py --model {args.model} --density {args.density:g} "
            f"--nodes {args.nodes} --rounds {args.rounds} --passes {args.passes} --json FILE"
        )
        content |= {"model": args.model, "density": args.density, "nodes": args.nodes}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if len(bits) > 1:
        raise SystemExit(1)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[list[dict]]]:
    """Per transport, round and rank what `rank_of` found."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, SIZE, SIZE)
    model = build_model("torchvision", args.model)
    pattern = api.sparsify_(model, args.nodes, args.density, (x,))
    api.partition(model, (x,), args.nodes, pattern=pattern).save(folder / "out", {})
    torch.save(x, folder / "x.pt")
    make_token(folder / "token")
    ports = free_ports(args.nodes + 1)
    (folder / "peers.yaml").write_text(
        "peers:\n" + "".join(f"  - 127.0.0.1:{port}\n" for port in ports[:-1])
    )
    make_keys(folder / "keys", Peers.from_yaml(folder / "peers.yaml"))
    found: dict[str, list[list[dict]]] = {transport: [] for transport in TRANSPORTS}
    for number in range(args.rounds):
        for transport, rounds in found.items():
            rounds.append(one_round(transport, args, folder, ports[-1]))
            print(f"round {number}, {transport}: {summary(transport, rounds[-1:])}", flush=True)
    return found


def one_round(transport: str, args: argparse.Namespace, folder: Path, port: int) -> list[dict]:
    for old in folder.glob("result-*"):
        old.unlink()
    task = {"transport": transport, "folder": str(folder), "passes": args.passes}
    command = [sys.executable, __file__, "--rank-of"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if transport == "mpi":
        beside = Path(sys.executable).with_name("mpiexec")
        mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
        words = [mpiexec, "-n", str(args.nodes), *command, json.dumps({**task, "rank": None})]
        subprocess.run([str(word) for word in words], env=env, check=True)
    else:
        running = []
        for rank in range(args.nodes):
            mine = {**env}
            if transport.startswith("torch"):
                mine |= {"TORCHELASTIC_RUN_ID": "bench", "MASTER_ADDR": "127.0.0.1"}
                mine |= {"MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(args.nodes)}
            words = [*command, json.dumps({**task, "rank": rank})]
            running.append(subprocess.Popen(words, env=mine))
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"a rank over {transport} failed")
    return [json.loads((folder / f"result-{r}").read_text()) for r in range(args.nodes)]


def rank_of(task: dict) -> None:
    """This process as one rank: warm up, then timed passes."""
    folder = Path(task["folder"])
    place, options = place_of(task, folder)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[place.rank % os.cpu_count()]})
    x = torch.load(folder / "x.pt")
    result: dict = {}
    with JoinedRank(folder / "out", place, options, threads=1) as joined:
        if joined.leads:
            for _ in range(5):
                joined.run(x)
            before = cpu_s()
            answers = []
            for _ in range(task["passes"]):
                time.sleep(0.01)  # others' messages of the last pass are over
                answers.append(joined.run(x))
            result["latency_ms"] = [answer.latency_ms for answer in answers]
            result["bytes_sent"] = answers[-1].bytes_sent
            result["cpu_ms"] = (cpu_s() - before) * 1e3
            digest = hashlib.sha256(answers[-1].outputs.numpy().tobytes())
            result["outputs_sha256"] = digest.hexdigest()
        else:
            joined.follow()
    (folder / f"result-{place.rank}").write_text(json.dumps(result))


def place_of(task: dict, folder: Path) -> tuple[Place, Options]:
    transport = task["transport"]
    if transport == "mpi":
        options = Options("mpi")
        return place_from_launcher(options), options
    if transport.startswith("torch"):
        options = Options("torch")
        return place_from_launcher(options), options
    tls = folder / "keys" / f"rank-{task['rank']}" if "TLS" in transport else None
    options = Options("tcp", folder / "token", tls=tls)
    return place_among(Peers.from_yaml(folder / "peers.yaml"), task["rank"], options), options


def summary(transport: str, rounds: list[list[dict]]) -> dict:
    leaders = [ranks[0] for ranks in rounds]
    latencies = sorted(ms for leader in leaders for ms in leader["latency_ms"])
    digests = {leader["outputs_sha256"] for leader in leaders}
    return {
        "transport": transport,
        "latency_ms_median": median(latencies),
        "latency_ms_p95": latencies[int(0.95 * (len(latencies) - 1))],
        "cpu_ms_per_pass": median(each["cpu_ms"] / len(each["latency_ms"]) for each in leaders),
        "bytes_sent_per_pass": leaders[-1]["bytes_sent"],
        "passes": len(latencies),
        "outputs_sha256": "".join(sorted(digests)),
    }


def cpu_s() -> float:
    """Of this process, all its threads, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def free_ports(count: int) -> list[int]:
    made = [listen("127.0.0.1") for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in made]
    for sock in made:
        sock.close()
    return ports


if __name__ == "__main__":
    main()
