"""`disco keys`, and what of its files is refused."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="needs the extra `tls`")

from disco import cli
from disco.errors import InputError
from disco.runtime.authority import Authority, Certified
from disco.runtime.keys import make_keys
from disco.runtime.peers import Peers
from disco.runtime.places import Options, place_among
from disco.runtime.tcp.tls import Tls

PEERS = Peers((("127.0.0.1", 7000), ("node-b.local", 7001), ("fd00::12", 7002)))
FILES = ["ca.pem", "cert.pem", "key.pem"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    make_keys(folder, PEERS)
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Rank 1's files, to be changed."""
    return Path(shutil.copytree(made / "rank-1", tmp_path / "own"))


def write(folder: Path, ca: Certified, own: Certified) -> Path:
    folder.mkdir(exist_ok=True)
    contents = (ca.certificate, own.certificate, own.key)
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    (folder / "key.pem").chmod(0o600)
    return folder


def days(count: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=count)


def test_only_the_owner_reads_what_is_made(made: Path) -> None:
    found = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    wanted = [f"rank-{rank}/{name}" for rank in range(3) for name in FILES]
    assert found == ["ca-key.pem", *wanted]
    for path in [made, *made.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in made.parent.iterdir()] == ["keys"], "something is left over"
    assert len({(made / f"rank-{rank}" / "key.pem").read_bytes() for rank in range(3)}) == 3


def test_every_rank_has_a_certificate_of_its_own(made: Path) -> None:
    for rank in range(3):
        loaded = Tls.load(made / f"rank-{rank}", rank)
        assert loaded.rank == rank
        assert str(days(365).year) in loaded.until
        other = (rank + 1) % 3
        with pytest.raises(
            InputError, match=f"certificate of rank {rank}, and this is rank {other}: give it"
        ):
            Tls.load(made / f"rank-{rank}", other)


def test_a_certificate_names_rank_and_host(made: Path) -> None:
    from cryptography import x509

    hosts = ["127.0.0.1", "node-b.local", "fd00::12"]
    for rank, host in enumerate(hosts):
        data = (made / f"rank-{rank}" / "cert.pem").read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        values = [str(name.value) for name in names]
        assert values == [host, f"disco-rank:{rank}"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(
        InputError, match=f"{name} cannot be read .*: TLS needs a folder with ca.pem"
    ):
        Tls.load(own, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(own: Path, name: str) -> None:
    (own / name).write_text("-----BEGIN NOTHING-----\n")
    with pytest.raises(InputError, match=rf"{name}.* cannot be read"):
        Tls.load(own, 1)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622])
def test_a_key_that_others_reach(own: Path, mode: int) -> None:
    (own / "key.pem").chmod(mode)
    with pytest.raises(InputError, match=r"others may read the key .*chmod 600"):
        Tls.load(own, 1)


def test_the_folder_of_all_ranks_is_not_one_ranks(made: Path) -> None:
    with pytest.raises(InputError, match=r"No such file .* `disco keys` makes it \(rank-2\)"):
        Tls.load(made, 2)


def test_an_end_that_is_near_is_said(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Tls.load(made / "rank-0", 0)
    assert not caplog.text
    authority = Authority.make(days(-30), days(29))
    Tls.load(write(tmp_path / "own", authority.pem, authority.issue(0, "a")), 0)
    assert "only: make new ones with `disco keys`" in caplog.text


def test_files_that_do_not_belong_together(made: Path, own: Path) -> None:
    shutil.copy(made / "rank-2" / "key.pem", own)
    with pytest.raises(InputError, match="do not belong together"):
        Tls.load(own, 1)


def test_a_key_with_a_password_does_not_ask_the_terminal(own: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key((own / "key.pem").read_bytes(), None)
    secret = s.BestAvailableEncryption(b"x")
    (own / "key.pem").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, secret))
    with pytest.raises(InputError, match="has a password, which nobody could type"):
        Tls.load(own, 1)


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [(-30, -1, "has expired; this machine's clock has"), (1, 30, "is not valid yet; this machine")],
)
def test_a_certificate_out_of_time(tmp_path: Path, begin: int, end: int, message: str) -> None:
    authority = Authority.make(days(begin), days(end))
    folder = write(tmp_path / "own", authority.pem, authority.issue(0, "127.0.0.1"))
    with pytest.raises(InputError, match=f"cert.pem {message}"):
        Tls.load(folder, 0)


def test_a_certificate_of_another_authority(made: Path, own: Path) -> None:
    other = Authority.make(days(-1), days(1))
    (own / "ca.pem").write_bytes(other.pem.certificate)
    with pytest.raises(InputError, match="is not of this cluster's authority"):
        Tls.load(own, 1)


def test_no_rank_makes_certificates(made: Path, tmp_path: Path) -> None:
    """Whoever has a rank's key cannot be another one with it."""
    from dataclasses import replace

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    real = Authority.make(days(-1), days(1))
    rank_1 = real.issue(1, "127.0.0.1")
    forged = replace(
        real,
        _certificate=x509.load_pem_x509_certificate(rank_1.certificate),
        _key=load_pem_private_key(rank_1.key, None),
    ).issue(0, "127.0.0.1")
    folder = write(tmp_path / "own", real.pem, forged)
    with (folder / "cert.pem").open("ab") as file:
        file.write(rank_1.certificate)  # the chain
    with pytest.raises(InputError, match="is not of this cluster's authority"):
        Tls.load(folder, 0)


# Writing ------------------------------------------------------------------------------------------


def test_old_keys_are_overwritten_only_on_request(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "keys"))
    before = (folder / "rank-0" / "key.pem").read_bytes()
    with pytest.raises(InputError, match="exists and is not empty: .* --overwrite"):
        make_keys(folder, PEERS)
    assert (folder / "rank-0" / "key.pem").read_bytes() == before
    make_keys(folder, Peers(PEERS.addresses[:2]), overwrite=True)
    assert (folder / "rank-0" / "key.pem").read_bytes() != before
    assert sorted(path.name for path in folder.iterdir()) == ["ca-key.pem", "rank-0", "rank-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize("name", ["thesis.tex", "rank-0/thesis.tex", "rank-9x/key.pem"])
def test_what_is_not_ours_is_never_overwritten(made: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "keys"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("years of work")
    with pytest.raises(InputError, match="is not overwritten, because `disco keys` does not make"):
        make_keys(folder, PEERS, overwrite=True)
    assert (folder / name).read_text() == "years of work"


def test_directories_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no directory"):
        make_keys(tmp_path / "a" / "b", PEERS)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no directory"):
        make_keys(tmp_path / "file", PEERS, overwrite=True)
    with pytest.raises(InputError, match="0 days were given; .* 1 to 3650"):
        make_keys(tmp_path / "new", PEERS, days=0)
    with pytest.raises(InputError, match="cannot be in a certificate"):
        make_keys(tmp_path / "new", Peers(((f"{'x' * 64}.local", 1),)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "disco.runtime.authority", None)
    with pytest.raises(InputError, match=r"pip install 'disco-kernels\[tls\]'"):
        make_keys(tmp_path / "new", PEERS)


def test_using_keys_does_not_need_the_package(made: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from disco import cli\n"
        "from disco.runtime.tcp.tls import Tls\n"
        f"Tls.load({str(made / 'rank-0')!r}, 0)\n"
    )
    path = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


# Options ------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peers.yaml").write_text("peers: ['127.0.0.1:7000', '[::1]:7001']")
    words = ["keys", str(tmp_path / "keys"), "--peers", str(tmp_path / "peers.yaml")]
    assert cli.main([*words, "--days", "30"]) == 0
    out = capsys.readouterr().out
    assert "rank-1: for rank 1 at [::1]:7001" in out and "ca-key.pem" in out
    assert f"valid until {days(30):%Y-%m-%d}" in out
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_one_machine_needs_no_tls(
    tiny_folder: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", str(tiny_folder), "--input", "x", "--tls", str(made / "rank-0")]
    assert cli.main(words) == 2
    assert "talk over loopback" in capsys.readouterr().err


def test_only_tcp_has_tls(made: Path) -> None:
    for name in ("torch", "mpi"):
        with pytest.raises(InputError, match=f"--tls was given with transport '{name}'"):
            Options(name, tls=made / "rank-0")


def test_keys_are_checked_before_anything_listens(made: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("0123456789abcdef")
    with pytest.raises(InputError, match="certificate of rank 1, and this is rank 0"):
        place_among(PEERS, 0, Options("auto", token, tls=made / "rank-1"))
