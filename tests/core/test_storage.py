import os
import stat
import subprocess
import sys
import threading

import pytest

from ropewalk.core.errors import UserError
from ropewalk.core.storage import owned, private_dir, read_json, regular_file, write_atomic


@pytest.mark.parametrize(("content", "stored"), [("grün\n", "grün\n".encode()), (b"\0\1", b"\0\1")])
def test_writes_the_whole_and_replaces_what_was_there(tmp_path, content, stored):
    path = tmp_path / "new" / "file"
    for _ in range(2):
        write_atomic(path, content)
        assert path.read_bytes() == stored
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_reader_sees_the_old_content_or_the_new(tmp_path):
    path, contents, seen = tmp_path / "file", {"a" * 200_000, "b" * 200_000}, set()
    write_atomic(path, "a" * 200_000)

    def write():
        for content in sorted(contents) * 10:
            write_atomic(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen <= contents


def test_a_private_directory_is_closed_to_others_even_when_it_was_open(tmp_path):
    path = tmp_path / "cache" / "code"
    for mode in (None, 0o777):
        if mode is not None:
            path.chmod(mode)
        assert private_dir(path) == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_link_that_a_person_names_is_followed_and_one_out_of_a_directory_is_not(tmp_path):
    (tmp_path / "real").write_text("x")
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "real")
    assert regular_file(home / "link") == tmp_path / "real"
    with pytest.raises(UserError, match=r"leads to .*real, outside of .*home"):
        regular_file(home / "link", home)
    for special in (home, "/dev/null"):
        with pytest.raises(UserError, match=r"is a (directory|device), not a regular file"):
            regular_file(tmp_path.joinpath(special))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{\n "a": 1,\n "b": }\n', "file:3: not valid JSON"),
        (b"\xff", "file: cannot be read as JSON"),
        (b"[" * 200_000, "file: cannot be read as JSON"),
        (b"[1]", "file:1: holds a JSON list, expected an object"),
    ],
)
def test_json_that_is_no_object_is_refused_with_its_place(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_json(path, tmp_path)


HOLD = """
import sys
from ropewalk.core.storage import owned
with owned(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_owns_a_directory_and_a_killed_owner_leaves_it_free(tmp_path):
    home = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process") as refusal, owned(home):
            pass
        assert str(home) in str(refusal.value)
        holder.kill()
        holder.wait()
    with owned(home):
        pass
    with owned(home):
        pass
