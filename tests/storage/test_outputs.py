"""A place to write to: overwrites only what is ours, is tried before work begins, has one writer."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evenkeel.errors import StorageError
from evenkeel.storage import (
    FileOutput,
    FolderOutput,
    Kind,
    alone,
    write_atomically,
    write_folder,
    write_json,
)

KIND = Kind("set", 1, "write it again", keys=("made_for",))
FOREIGN = {"letter.txt": b"dear all", "photo.safetensors": b"\x08\0\0\0\0\0\0\0{}      "}


def is_ours(path):
    return path.read_bytes().startswith(b'{\n "format": "evenkeel-set"')


FILE = FileOutput("set", is_ours)
FOLDER = FolderOutput(KIND, ("x.txt", "[0-9]*.png"))
EACH = pytest.mark.parametrize("output", [FILE, FOLDER], ids=["file", "folder"])


def listing(folder):
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@EACH
def test_a_new_place_is_tried_and_left_as_it_was(output, tmp_path):
    before = listing(tmp_path)
    output.check(tmp_path / "new" / "deep" / "name")
    assert listing(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_replaced_only_by_force(name, tmp_path):
    place = tmp_path / name
    place.write_bytes(FOREIGN[name])
    with pytest.raises(StorageError, match=rf"{name}.*--force"):
        FILE.check(place)
    FILE.check(place, force=True)
    assert place.read_bytes() == FOREIGN[name]


def test_what_is_ours_or_empty_may_be_replaced(tmp_path):
    write_json(tmp_path / "ours", KIND, {"made_for": 1})
    (tmp_path / "empty").touch()
    for name in ("ours", "empty"):
        FILE.check(tmp_path / name)


def test_a_folder_in_place_of_a_file_and_the_reverse_are_refused_even_by_force(tmp_path):
    (tmp_path / "file").write_text("x")
    for output, place in ((FILE, tmp_path), (FOLDER, tmp_path / "file")):
        with pytest.raises(StorageError) as caught:
            output.check(place, force=True)
        assert str(place) in str(caught.value) and "--force" not in str(caught.value)


@EACH
@pytest.mark.parametrize("how", ["itself", "link", "below"])
def test_a_device_is_refused_even_by_force(output, how, tmp_path):
    os.mkfifo(tmp_path / "device")  # what is neither file nor folder
    place = {"itself": "device", "link": "link", "below": "device/inside"}[how]
    (tmp_path / "link").symlink_to(tmp_path / "device")
    for force in (False, True):
        with pytest.raises(StorageError, match="device"):
            output.check(tmp_path / place, force=force)


@EACH
def test_a_link_that_leaves_its_folder_needs_force(output, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    inside.mkdir()
    (inside / "link").symlink_to(outside / "target")
    if output is FOLDER:
        (outside / "target").mkdir()
    with pytest.raises(StorageError, match=r"link.*leads to .*target.*--force"):
        output.check(inside / "link")
    output.check(inside / "link", force=True)
    assert [*outside.iterdir()] == ([outside / "target"] if output is FOLDER else [])


@EACH
@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1bb", " ", "x" * 300])
def test_an_impossible_name_is_refused_and_named(output, name, tmp_path):
    with pytest.raises(StorageError) as caught:
        output.check(tmp_path / name)
    said = str(caught.value)
    assert "\n" not in said and "\0" not in said and ascii(name)[1:-1][:20] in said


@EACH
def test_a_file_among_the_parents_is_named(output, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file is a file"):
        output.check(tmp_path / "file" / "deep" / "name")


@EACH
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs a place nobody can write to")
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(output):
    with pytest.raises(StorageError, match=r"/proc/self/fd.*cannot be written"):
        output.check(Path("/proc/self/fd/evenkeel-test"))


def test_files_in_a_folder_are_ours_only_where_its_manifest_lists_them(tmp_path):
    write_folder(tmp_path, KIND, {"made_for": 1}, {"x.txt": "x"})
    FOLDER.check(tmp_path)  # ours, to be replaced
    (tmp_path / "notes.md").write_text("somebody's")
    FOLDER.check(tmp_path)  # in nobody's way
    (tmp_path / "00000.png").write_text("somebody's")
    with pytest.raises(StorageError, match=r"00000.png.*--force"):
        FOLDER.check(tmp_path)
    FOLDER.check(tmp_path, force=True)


def test_a_foreign_manifest_makes_nothing_ours(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps({"files": {"x.txt": "0"}}))
    with pytest.raises(StorageError, match=r"set.json.*--force"):
        FOLDER.check(tmp_path)


def test_what_an_interrupted_writer_left_is_ours(tmp_path):
    (tmp_path / "x.txt.new").write_text("half")
    (tmp_path / f"set.json.{os.getpid()}.partial").write_text("half")
    FOLDER.check(tmp_path)


def test_the_remains_of_a_dead_writer_are_swept_away_and_of_a_living_one_are_not(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead, living = (tmp_path / f"a.{pid}.partial" for pid in (int(ended.stdout), os.getppid()))
    dead.touch()
    living.touch()
    write_atomically(tmp_path / "a", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a", living.name}


def test_a_second_writer_is_told_and_the_first_is_not_disturbed(tmp_path):
    with alone(tmp_path / "work"):
        with pytest.raises(StorageError, match=r"work.*another"), alone(tmp_path / "work"):
            pass
        code = "import sys; from evenkeel.storage import alone; alone(sys.argv[1]).__enter__()"
        ran = subprocess.run([sys.executable, "-c", code, tmp_path / "work"], stderr=-1, text=True)
        assert ran.returncode == 1 and "StorageError" in ran.stderr and "another" in ran.stderr
    with alone(tmp_path / "work"):  # given back
        pass
    assert [*tmp_path.rglob("*")] == [tmp_path / "work"]  # no lock is left behind


def test_of_many_writers_at_once_one_has_the_folder(tmp_path):
    inside, most, refused = [0], [0], [0]

    def work():
        for _ in range(50):
            try:
                with alone(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except StorageError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and refused[0] < 200


def test_no_space_left_names_the_file(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left.*big\.bin") as caught:
        write_atomically(tmp_path / "big.bin", full)
    assert caught.value.errno == 28 and not [*tmp_path.iterdir()]


def test_a_folder_of_folders_is_one_result(tmp_path):
    place = write_folder(tmp_path / "f", KIND, {"made_for": 1}, {"x.txt": "x", "in/y.txt": "y"})
    assert (place / "in" / "y.txt").read_text() == "y"
    with pytest.raises(StorageError, match="not the name of a file"):
        write_folder(tmp_path / "g", KIND, {"made_for": 1}, {"in/../../y.txt": "y"})


def test_a_link_inside_a_folder_does_not_lead_its_writer_out(tmp_path):
    outside, place = tmp_path / "outside", tmp_path / "f"
    outside.mkdir()
    place.mkdir()
    (place / "in").symlink_to(outside)
    with pytest.raises(StorageError, match="leads out"):
        write_folder(place, KIND, {"made_for": 1}, {"in/y.txt": "y"})
    assert not [*outside.iterdir()]
