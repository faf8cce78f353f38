"""What a save writes, removes and refuses in the folder of a run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppsf_dist.checkpoints.disk import SummingWriter
from ppsf_dist.checkpoints.lock import MOST
from ppsf_dist.fsdp import load_checkpoint, release_checkpoint, remove_checkpoint, save_checkpoint
from tests.checkpoints.small import DATA, EXTRA, MANIFEST, METADATA, as_early_release, equal, fresh, saved, trained


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_only_what_carries_the_mark_is_removed(tmp_path: Path) -> None:
    for name in ("2024", "7", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / EXTRA).write_text("a person's")
    (tmp_path / "31").mkdir()
    (tmp_path / "12").symlink_to(tmp_path / "2024")
    for steps in (1, 2, 3):
        pair = saved(tmp_path, steps)
    assert names(tmp_path) == {"2024", "7", "notes", "31", "12", "2", "latest", "lock"}
    assert names(tmp_path / "2") == {DATA, METADATA, EXTRA, MANIFEST}
    assert all((tmp_path / name / EXTRA).read_text() == "a person's" for name in ("2024", "7", "notes"))
    other = fresh(1)
    assert load_checkpoint(tmp_path, *other) == {"step": 3} and equal(pair, other)


def test_a_persons_file_in_an_old_save_stays_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    (tmp_path / "0" / "notes.txt").write_text("mine")
    saved(tmp_path)
    assert (tmp_path / "0" / "notes.txt").read_text() == "mine" and not (tmp_path / "0" / DATA).exists()
    assert "notes.txt" in caplog.text and str(tmp_path / "0") in caplog.text


@pytest.mark.parametrize("kind", ["folder", "file", "link", "marked"])
def test_a_foreign_folder_of_the_needed_name_is_refused(kind: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / EXTRA).write_text("a person's")
    path = tmp_path / "run"
    path.mkdir()
    needed = path / "0"
    if kind == "link":
        needed.symlink_to(elsewhere)
    elif kind == "file":
        needed.write_text("a person's")
    else:
        needed.mkdir()
        (needed / "notes").write_text("a person's")
        if kind == "marked":
            (needed / MANIFEST).touch()
    with pytest.raises(FileExistsError, match=f"{needed}.*another path"):
        saved(path)
    left = needed if kind == "file" else elsewhere / EXTRA if kind == "link" else needed / "notes"
    assert left.read_text() == "a person's" and names(elsewhere) == {EXTRA}
    assert names(path) == {"0", "lock"}


@pytest.mark.parametrize("text", ["../B/0", "/abs/0", "", " ", "0/../../B/0", "-1", "٣", "0 zzzz", "\udc80"])
def test_latest_names_a_number_or_is_refused(text: str, tmp_path: Path) -> None:
    saved(tmp_path / "B")
    saved(tmp_path / "A")
    (tmp_path / "A" / "latest").write_text(text, errors="surrogateescape")
    pair = fresh(1)
    for action in (load_checkpoint, save_checkpoint):
        with pytest.raises(ValueError, match="latest holds"):
            action(tmp_path / "A", *pair)
    assert equal(pair, fresh(1)) and names(tmp_path / "A") == {"0", "latest", "lock"}


def test_latest_that_names_nothing_is_refused_and_is_no_new_run(tmp_path: Path) -> None:
    """A caller that begins anew where there is no checkpoint must not do so here."""
    saved(tmp_path)
    (tmp_path / "latest").write_text("5")
    with pytest.raises(ValueError, match="names the folder 5, which is not there"):
        load_checkpoint(tmp_path, *fresh())


def test_nothing_is_read_through_links(tmp_path: Path) -> None:
    pair = fresh(1)
    for name in ("latest", "0", f"0/{METADATA}", f"0/{DATA}", f"0/{EXTRA}", f"0/{MANIFEST}"):
        path = tmp_path / name.replace("/", "_")
        saved(path)
        (path / name).rename(tmp_path / "moved")
        (path / name).symlink_to(tmp_path / "moved")
        for verify in (True, False):
            if verify or name != f"0/{MANIFEST}":
                with pytest.raises(ValueError, match="is a link|is no plain file"):
                    load_checkpoint(path, *pair, verify=verify)
        moved = tmp_path / "moved"
        shutil.rmtree(moved) if moved.is_dir() else moved.unlink()
    assert equal(pair, fresh(1))


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("a person's")
    path = tmp_path / "run"
    path.mkdir()
    (path / "latest.new").symlink_to(victim)
    saved(path)
    (path / "latest").rename(tmp_path / "pointer")
    (path / "latest").symlink_to(tmp_path / "pointer")
    with pytest.raises(ValueError, match="no plain file"):
        saved(path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"other/lock"):
        saved(tmp_path / "other")
    assert victim.read_text() == "a person's"


def in_fork(task: Callable[[], Any]) -> int:
    """Run something in a copy of this process; returns its status, as of ``os.waitpid``."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def killed_at(point: int, task: Callable[[], Any]) -> bool:
    """Run something in a copy of this process that is killed before its n-th change of the disk. False: it ended."""

    def doomed() -> None:
        count = 0

        def reaches_the_end() -> bool:
            nonlocal count
            count += 1
            return count == point

        def fatal(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                if reaches_the_end():
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        def write(file: SummingWriter, data: Any) -> int:
            if file.tell() == 0 and reaches_the_end():
                first(file, memoryview(data)[: len(data) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return first(file, data)

        for name in CHANGES:
            setattr(os, name, fatal(getattr(os, name)))
        first = SummingWriter.write
        SummingWriter.write = write  # type: ignore[method-assign]
        task()

    status = in_fork(doomed)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(("kind", "stride"), [("second", 1), ("first", 3), ("early", 3)])
def test_a_save_that_is_killed_anywhere_leaves_a_checkpoint(kind: str, stride: int, tmp_path: Path) -> None:
    before, after = trained(1), trained(2)
    origin, path = tmp_path / "origin", tmp_path / "run"
    if kind != "first":
        save_checkpoint(origin, *before, {"step": 1})
        release_checkpoint()
        (origin / "lock").unlink()
        if kind == "early":
            as_early_release(origin)
    point = 1
    steps = []
    while True:
        shutil.rmtree(path, ignore_errors=True)
        if kind != "first":
            shutil.copytree(origin, path)
        if not killed_at(point, lambda: save_checkpoint(path, *after, {"step": 2})):
            break
        loaded = fresh(1)
        if kind != "first" or (path / "latest").exists():
            steps.append(load_checkpoint(path, *loaded)["step"])
            assert equal(loaded, {1: before, 2: after}[steps[-1]]), point
        else:
            steps.append(0)
        # Whatever is left, the next save goes through.
        saved(path)
        release_checkpoint()
        left = names(path) - {"latest", "lock", (path / "latest").read_text().split()[0]}
        # Once its mark is gone, nothing tells an empty folder from a person's; nor, before it has one, an early save.
        assert not left or left == {"0"} and steps[-1] == 2 and (kind == "early" or not names(path / "0")), point
        point += stride
    # The change from one to the other comes once.
    assert steps == sorted(steps) and (len(set(steps)) == 2 or stride > 1) and point > 20


def test_everything_is_on_disk_before_latest_moves_and_anything_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    events: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        events.append(("replace", str(target)))

    def unlinked(path: Any, **options: Any) -> None:
        unlink(path, **options)
        events.append(("unlink", str(path)))

    for name, function in {"fsync": synced, "replace": replaced, "unlink": unlinked}.items():
        monkeypatch.setattr(os, name, function)
    saved(tmp_path)
    moved = events.index(("replace", str(tmp_path / "latest")))
    new = tmp_path / "1"
    for name in (DATA, f"{METADATA}.tmp", EXTRA, f"{MANIFEST}.new"):
        assert ("fsync", str(new / name)) in events[:moved], name
    # The folder's names after its last file, and the folder's own.
    assert events[:moved].index(("replace", str(new / MANIFEST))) < moved
    assert ("fsync", str(new)) in events[events.index(("fsync", str(new / EXTRA))) : moved]
    assert ("fsync", str(tmp_path)) in events[:moved]
    assert events[moved - 1] == ("fsync", str(tmp_path / "latest.new"))
    assert events[moved + 1] == ("fsync", str(tmp_path))
    assert not any(kind == "unlink" and str(tmp_path / "0") in what for kind, what in events[: moved + 1])


class Other:
    """Another job that saves to a path and stays."""

    def __init__(self, path: Path, *, before: Callable[[], None] = lambda: None) -> None:
        ready, done = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                before()
                saved(path, 2)
                os.write(done, b"1")
                signal.pause()
            finally:
                os._exit(1)
        os.close(done)
        assert os.read(ready, 1) == b"1"
        os.close(ready)

    @property
    def pid(self) -> int:
        return self._pid

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def test_the_second_of_two_jobs_on_one_path_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    other = Other(tmp_path)
    try:
        with pytest.raises(RuntimeError, match=f"{tmp_path}, where another job saves .process {other.pid} on"):
            saved(tmp_path)
        with pytest.raises(RuntimeError, match="another job saves"):
            remove_checkpoint(tmp_path)
        # Reading needs no lock, and changes nothing about it.
        assert load_checkpoint(tmp_path, *fresh()) == {"step": 2}
        with pytest.raises(RuntimeError, match="another job saves"):
            saved(tmp_path)
        # Another path is another matter.
        saved(tmp_path / "mine")
    finally:
        other.kill()
    saved(tmp_path, 3)
    saved(tmp_path / "mine")
    assert load_checkpoint(tmp_path, *fresh()) == {"step": 3}


def test_a_fork_does_not_keep_the_lock_of_a_process_that_is_gone(tmp_path: Path) -> None:
    def fork_and_die() -> None:
        saved(tmp_path)
        if os.fork() == 0:
            os.write(done, str(os.getpid()).encode())
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)

    ready, done = os.pipe()
    in_fork(fork_and_die)
    worker = int(os.read(ready, 20))
    try:
        saved(tmp_path, 4)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_without_locks_a_save_of_another_job_in_between_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    saved(tmp_path)
    saved(tmp_path)
    assert "cannot be locked" in caplog.text

    def another_job() -> None:
        release_checkpoint()
        saved(tmp_path, 2)

    assert in_fork(another_job) == 0
    with pytest.raises(RuntimeError, match="another job has saved since"):
        saved(tmp_path)
    assert load_checkpoint(tmp_path, *fresh()) == {"step": 2}
    saved(tmp_path)


def test_a_folder_that_was_removed_and_made_anew_is_locked_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    saved(path)
    shutil.rmtree(path)
    saved(path)
    assert os.waitstatus_to_exitcode(in_fork(lambda: pytest.raises(RuntimeError, saved, path))) == 0


def test_saving_each_time_into_a_new_folder_keeps_few_of_them_open(tmp_path: Path) -> None:
    pair = trained(1)
    for number in range(2 * MOST):
        save_checkpoint(tmp_path / str(number), *pair)
    opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    locked = {Path(target).parent for target in opened if target.startswith(str(tmp_path))}
    assert locked == {tmp_path / str(number) for number in range(MOST, 2 * MOST)}

    # One that is used again is not the oldest any more.
    save_checkpoint(tmp_path / str(MOST), *pair)
    save_checkpoint(tmp_path / "new", *pair)
    held = tmp_path / str(MOST)
    assert os.waitstatus_to_exitcode(in_fork(lambda: pytest.raises(RuntimeError, saved, held))) == 0


def test_a_checkpoint_of_an_early_release_loads_and_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = saved(tmp_path)
    early = as_early_release(tmp_path)
    (tmp_path / "2024").mkdir()
    release_checkpoint()
    loaded = fresh(1)
    assert load_checkpoint(tmp_path, *loaded) == {"step": 3} and equal(pair, loaded)
    assert "without checksums" in caplog.text and str(early) in caplog.text
    saved(tmp_path)
    assert names(tmp_path) == {"1", "2024", "latest", "lock"}

    # What is not wholly the early release's is not removed.
    early = as_early_release(tmp_path)
    (early / "notes.txt").write_text("mine")
    release_checkpoint()
    saved(tmp_path)
    assert names(early) == {DATA, METADATA, EXTRA, "notes.txt"}


def test_what_a_run_has_saved_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run"
    remove_checkpoint(path)
    saved(path)
    remove_checkpoint(path)
    assert not path.exists()
    saved(path)
    as_early_release(path)
    (path / "2024").mkdir()
    remove_checkpoint(path)
    assert names(path) == {"2024"}
