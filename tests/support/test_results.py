"""results.py: where files can be written, and the lock. test_train.py has what a run refuses and replaces."""

import errno
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import files_in

from support import results


def test_check_writable(tmp_path, monkeypatch):
    """It leaves nothing; and a folder that is a link to a missing place cannot be made."""
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a.png", tmp_path / "new" / "deep" / "a.png", Path("b.png"), Path("new") / "b.png"):
        results.check_writable(path)
    assert files_in(tmp_path) == []
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "not" / "mounted")
    for name in ("", "file/a", "file/a/b", "x" * 300, "link/a"):
        with pytest.raises(ValueError, match=r"folder|cannot be written"):
            results.check_writable(tmp_path / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 2**20))
    results.check_writable(tmp_path / "file", 2**20)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"
    with pytest.raises(ValueError, match="GiB"):
        results.check_writable(tmp_path / "a", 2**20 + 1)


HOLD = "import sys; from pathlib import Path; from support.results import lock\n"
HOLD += "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    command, root = [sys.executable, "-c", HOLD, tmp_path / "best.safetensors"], Path(results.__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another run is writing .*best\.safetensors"):
            results.lock(tmp_path / "best.safetensors").__enter__()
        other.kill()
    with results.lock(tmp_path / "best.safetensors"):
        assert files_in(tmp_path) == [".best.lock"]
    assert files_in(tmp_path) == []


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    """As some network file systems are. A temporary file may then be another run's."""

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".best.png.1234").touch()
    with results.lock(tmp_path / "best.safetensors"):
        pass
    assert files_in(tmp_path) == [".best.png.1234"]
