"""A result of several files appears as one: cut anywhere, all of the old or all of the new is there."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_denoisers import dit

from evenkeel.errors import StorageError
from evenkeel.quantizers.saved.foreign_folder import FOREIGN, save_foreign
from evenkeel.storage import Kind, claim, listed, read_folder, workplace, write_folder

KIND = Kind("set", 1, "write it again", keys=("made_for",))
OLD, NEW = ({"x.txt": f"{word} x", "y.bin": f"{word} y".encode()} for word in ("old", "new"))


def write(folder, files, word):
    return write_folder(folder, KIND, {"made_for": word}, files)


def content(folder):
    """The one word that every part of the folder says."""
    header, paths = read_folder(folder, KIND)
    words = {header["made_for"], *(path.read_text().split()[0] for path in paths.values())}
    assert sorted(paths) == ["x.txt", "y.bin"]
    (word,) = words
    return word


def test_files_and_header_come_back(tmp_path):
    folder = write(tmp_path / "deep" / "f", OLD, "old")
    assert content(folder) == "old"
    assert {p.name for p in folder.iterdir()} == {"x.txt", "y.bin", "set.json"}
    assert content(write(folder, NEW, "new")) == "new"
    assert {p.name for p in folder.iterdir()} == {"x.txt", "y.bin", "set.json"}


@pytest.mark.parametrize("after", range(5))
def test_cut_before_any_rename_the_old_or_the_new_is_there(tmp_path, monkeypatch, after):
    """Five renames: two files beside their places, the manifest, two files to their places."""
    folder, real, left = write(tmp_path / "f", OLD, "old"), os.replace, [after]

    def cut(a, b):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(a, b)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        write(folder, NEW, "new")
    monkeypatch.undo()
    assert content(folder) == ("old" if after < 3 else "new")
    assert content(write(folder, OLD, "old")) == "old"
    assert {p.name for p in folder.iterdir()} == {"x.txt", "y.bin", "set.json"}


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_manifest import NEW, write
real, left = os.replace, [int(sys.argv[2])]
def cut(a, b):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    real(a, b)
os.replace = cut
write(Path(sys.argv[1]), NEW, "new")
"""


@pytest.mark.parametrize("after", [1, 3])
def test_killed_between_two_files(tmp_path, after):
    folder = write(tmp_path / "f", OLD, "old")
    here = Path(__file__).parent
    code = [sys.executable, "-c", KILLED, folder, str(after), here, here.parent / "helpers"]
    assert subprocess.run(code).returncode == 9
    assert {p.name for p in folder.iterdir()} > {"x.txt", "y.bin", "set.json"}
    assert content(folder) == ("old" if after < 3 else "new")
    # The next writer is cut as well: what counted before it counts after it.
    assert subprocess.run([*code[:4], "0", *code[5:]]).returncode == 9
    assert content(folder) == ("old" if after < 3 else "new")
    assert content(write(folder, NEW, "new")) == "new"
    left = {p.name for p in folder.iterdir() if p.suffix != ".partial"}
    assert left == {"x.txt", "y.bin", "set.json"}


def test_a_writer_that_fails_leaves_the_old_set_and_nothing_else(tmp_path):
    folder = write(tmp_path / "f", OLD, "old")

    def full(path):
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(folder, {"x.txt": "new x", "y.bin": full}, "new")
    assert content(folder) == "old"
    assert {p.name for p in folder.iterdir()} == {"x.txt", "y.bin", "set.json"}


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "x.txt").unlink(), "x.txt is missing"),
        (lambda f: (f / "x.txt").write_text("old X"), "x.txt was changed"),
        (lambda f: (f / "y.bin").write_bytes(b"old"), "y.bin was changed"),
        (lambda f: os.replace(f / "x.txt", f / "y.bin"), "x.txt is missing"),
        (lambda f: (f / "set.json").unlink(), "set.json is not a file"),
        (lambda f: (f / "set.json").write_text("{}"), "not an evenkeel set"),
    ],
)
def test_a_missing_or_changed_file_is_named(tmp_path, damage, match):
    folder = write(tmp_path / "f", OLD, "old")
    damage(folder)
    with pytest.raises(StorageError, match=match):
        read_folder(folder, KIND)


def test_files_of_two_folders_do_not_mix(tmp_path):
    one, two = write(tmp_path / "a", OLD, "old"), write(tmp_path / "b", NEW, "new")
    (one / "x.txt").write_bytes((two / "x.txt").read_bytes())
    with pytest.raises(StorageError, match=r"x.txt was changed"):
        read_folder(one, KIND)


@pytest.mark.parametrize("name", ["../x", "a//b", "a/./b", "", "..", "a/../../b", "/etc/x"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(StorageError, match="not the name of a file"):
        write_folder(tmp_path / "f", KIND, {"made_for": 1}, {name: "x"})
    assert not (tmp_path / "f").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(StorageError, match="is a file; give a folder"):
        write(tmp_path / "f", OLD, "old")
    with pytest.raises(StorageError, match="is not a folder"):
        read_folder(tmp_path / "f", KIND)


def test_a_claim_is_this_runs_or_refused(tmp_path):
    path, run = tmp_path / "work" / "run.json", {"steps": 20, "clip": float("-inf"), "at": (1, 2)}
    claim(path, KIND, run)
    claim(path, KIND, run)
    said = (
        r"work holds finished work of another set, which differs in seed \(nothing there, 1 here\)"
    )
    with pytest.raises(StorageError, match=said + r", steps \(20 there, 30 here\)\. Remove"):
        claim(path, KIND, {**run, "steps": 30, "seed": 1})
    path.write_text("{")
    with pytest.raises(StorageError, match=r"run.json is not JSON"):
        claim(path, KIND, run)


def test_a_folder_that_is_a_disk_of_its_own_takes_a_result_of_several_files(tmp_path, monkeypatch):
    out, moved = tmp_path / "out", os.replace

    def replace(source, target):
        if out in Path(target).parents and out not in Path(source).parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        moved(source, target)

    monkeypatch.setattr(os, "replace", replace)
    save_foreign(dit(), out)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []
    assert listed(out, FOREIGN)


def test_a_workplace_is_gone_afterwards_and_so_is_that_of_a_killed_process(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "out" / f".work.{dead.pid}.a.partial" / "half").mkdir(parents=True)
    with workplace(tmp_path / "out") as inside:
        assert [*(tmp_path / "out").iterdir()] == [inside]
    assert [*(tmp_path / "out").iterdir()] == []
    with pytest.raises(ZeroDivisionError), workplace(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="is a file"), workplace(tmp_path / "file"):
        pass
