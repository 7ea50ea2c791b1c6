"""Checkpoints survive kills at every file operation, full disks and damage; the newest K and the best are kept."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ilr_fast.checkpoint import best_good, newest_good, save
from ilr_fast.errors import UserError


class Blob:
    """A host whose weights are bytes that its step determines."""

    trains = True

    def __init__(self, name: str, step: int = 0, size: int = 20_000):
        self.name, self.step, self.size = name, step, size

    def content(self) -> bytes:
        return random.Random(f"{self.name}{self.step}").randbytes(self.size)

    def hold(self) -> bool:
        return False

    def save_model(self, folder: Path) -> None:
        (folder / "model.bin").write_bytes(self.content())

    def save_state(self, folder: Path) -> None:
        (folder / "optimizer.bin").write_bytes(self.content()[::-1])

    def load(self, model: Path, state: Path) -> None:
        self.loaded = (model / "model.bin").read_bytes(), (state / "optimizer.bin").read_bytes()


class Peer(Blob):
    trains = False


def put(folder: Path, step: int, score: float | None = None, keep: int = 2, size: int = 20_000) -> Path:
    hosts = {name: Blob(name, step, size) for name in ("a", "b")}
    return save(folder, step, hosts, {"seed": 7, "fingerprint": "f"}, keep=keep, score=score)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def whole(folder: Path) -> int:
    """The step of the newest good checkpoint, whose content is checked against that step."""
    checkpoint = newest_good(folder)
    if checkpoint is None:
        return 0
    hosts = {name: Blob(name, checkpoint.step) for name in ("a", "b")}
    checkpoint.restore(hosts)
    for host in hosts.values():
        assert host.loaded == (host.content(), host.content()[::-1])
    return checkpoint.step


def test_layout_and_state(tmp_path):
    path = put(tmp_path / "checkpoints", 10, 0.5)
    assert path.name == "step_000010" and names(path) == ["a", "a.state", "b", "b.state", "manifest.json", "state.json"]
    state = json.loads((path / "state.json").read_text())
    assert state == {"seed": 7, "fingerprint": "f", "step": 10, "validation_accuracy": 0.5, "agents": ["a", "b"]}
    checkpoint = newest_good(tmp_path / "checkpoints")
    assert (checkpoint.step, checkpoint.score, checkpoint.state["seed"]) == (10, 0.5, 7)
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_000010"


def test_none_yet(tmp_path):
    assert newest_good(tmp_path / "checkpoints") is None and best_good(tmp_path) is None


def test_newest_k_and_the_best_are_kept(tmp_path):
    for step, score in ((1, 0.2), (2, 0.6), (3, None), (4, 0.6), (5, 0.1), (6, float("nan")), (7, 0.3)):
        put(tmp_path, step, score)
    assert names(tmp_path) == ["best", "step_000004", "step_000006", "step_000007"]
    assert best_good(tmp_path).step == 4 and newest_good(tmp_path).step == 7
    put(tmp_path, 8, 0.7, keep=1)
    assert names(tmp_path) == ["best", "step_000008"]


def test_a_copy_that_followed_the_link_goes_on(tmp_path):
    put(tmp_path, 4, 0.5)
    os.unlink(tmp_path / "best")
    shutil.copytree(tmp_path / "step_000004", tmp_path / "best")
    assert best_good(tmp_path).step == 4
    put(tmp_path, 5, 0.6)
    assert os.readlink(tmp_path / "best") == "step_000005" and best_good(tmp_path).step == 5


def test_a_best_that_was_copied_alone_is_kept_aside(tmp_path):
    put(tmp_path, 4, 0.5)
    os.unlink(tmp_path / "best")
    os.rename(tmp_path / "step_000004", tmp_path / "best")
    put(tmp_path, 1, 0.2)
    assert names(tmp_path) == ["best", "copied_best", "step_000001"] and best_good(tmp_path).step == 1
    assert json.loads((tmp_path / "copied_best" / "state.json").read_text())["step"] == 4


def test_without_scores_there_is_no_best(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step_000003"] and best_good(tmp_path).step == 3


@pytest.mark.parametrize("file", ["a/model.bin", "b.state/optimizer.bin", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "empty"])
def test_damaged_is_named_and_skipped(tmp_path, caplog, file, damage):
    put(tmp_path, 1, 0.1), put(tmp_path, 2, 0.9)
    path = tmp_path / "step_000002" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flipped": bytes(content), "truncated": content[:-7], "empty": b""}[damage])
    assert whole(tmp_path) == 1 and best_good(tmp_path).step == 1
    assert (str(path) if file != "manifest.json" else "step_000002") in caplog.text
    put(tmp_path, 2, 0.3)  # the step is taken again
    assert whole(tmp_path) == 2


def test_all_damaged_is_the_users_to_mend(tmp_path):
    put(tmp_path, 1), put(tmp_path, 2)
    for step in (1, 2):
        (tmp_path / f"step_{step:06d}" / "a" / "model.bin").write_bytes(b"short")
    with pytest.raises(UserError) as caught:
        newest_good(tmp_path)
    assert "step_000002/a/model.bin has 5 bytes instead of 20000" in caught.value.what and caught.value.remedy


def test_skipped_later_checkpoints_do_not_push_good_ones_out(tmp_path):
    put(tmp_path, 10, 0.4), put(tmp_path, 20, 0.9)
    (tmp_path / "step_000020" / "a" / "model.bin").write_bytes(b"")
    put(tmp_path, 12, keep=1)
    assert whole(tmp_path) == 12 and names(tmp_path) == ["best", "step_000010", "step_000012"]


def test_another_config_and_other_agents(tmp_path):
    put(tmp_path, 1)
    assert newest_good(tmp_path, "f").step == 1
    with pytest.raises(UserError, match="another config"):
        newest_good(tmp_path, "g")
    with pytest.raises(UserError, match="agents a, b; the config trains a, c"):
        newest_good(tmp_path).restore({"a": Blob("a"), "c": Blob("c")})


def test_peers_that_only_talk_are_not_saved(tmp_path):
    hosts = {"a": Blob("a", 3), "p": Peer("p")}
    path = save(tmp_path, 3, hosts, {}, keep=1, score=None)
    assert not (path / "p").exists()
    newest_good(tmp_path).restore(hosts)
    assert hosts["a"].loaded and not hasattr(hosts["p"], "loaded")


@pytest.mark.parametrize("copied", ["both", "one"])
def test_updates_may_go_on_once_all_is_copied_or_else_written(copied, tmp_path):
    told = []

    class Held(Blob):
        def hold(self) -> bool:
            told.append(f"{self.name} copied")
            return copied == "both" or self.name == "a"

        def save_state(self, folder: Path) -> None:
            told.append(f"{self.name} written")
            super().save_state(folder)

    hosts = {name: Held(name, 1) for name in ("a", "b")}
    save(tmp_path, 1, hosts, {}, keep=1, score=None, on_read=lambda: told.append("go on"))
    assert told[told.index("go on") - 1] == ("b copied" if copied == "both" else "b written")
    assert told[-1] == "go on" and whole(tmp_path) == 1


def test_a_failing_save_leaves_what_was(tmp_path):
    put(tmp_path, 1)

    class Broken(Blob):
        def save_state(self, folder: Path) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        save(tmp_path, 2, {"a": Blob("a", 2), "b": Broken("b", 2)}, {}, keep=1, score=None)
    assert names(tmp_path) == ["step_000001"] and whole(tmp_path) == 1


EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
from ilr_fast.checkpoint import _damage
from test_checkpoint import put, whole

OPERATIONS = {f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "symlink", "scandir")}

def child(folder, fatal):
    # put() under an audit hook that kills this process at its `fatal`-th file operation
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event == "open" or event in OPERATIONS:
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    put(folder, 3, 0.5, keep=1)
    os._exit(0)

root, fatal, steps = Path(sys.argv[1]), 0, []
while True:
    fatal += 1
    folder = root / str(fatal)
    put(folder, 1, 0.9, keep=1)
    put(folder, 2, 0.2, keep=1)
    child_id = os.fork()
    if child_id == 0:
        child(folder, fatal)
    status = os.waitpid(child_id, 0)[1]
    steps.append(whole(folder))
    assert steps[-1] in (2, 3), (fatal, steps)
    assert not any(_damage(path) for path in folder.glob("step_*")), "what is visible is whole"
    put(folder, 4, 0.3, keep=1)
    assert whole(folder) == 4
    left = sorted(p.name for p in folder.iterdir())
    assert left == ["best", "step_000001", "step_000004"], (fatal, left)
    shutil.rmtree(folder)
    if not os.WIFSIGNALED(status):
        break
assert steps == sorted(steps) and steps[0] == 2, steps
print(fatal)
"""


def run_python(code: str, *arguments: object, **options) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True,
                            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, **options)


@pytest.fixture
def fast_folder():
    """A folder in memory where there is one: a kill is no power cut, so what reached no disk is not lost."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_killed_at_every_file_operation_of_a_save(fast_folder):
    process = run_python(EVERY_OPERATION, fast_folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert int(output) > 30  # a save has that many operations at the least: the hook did count


SAVER = """
import sys
from pathlib import Path
from test_checkpoint import put, whole
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
for step in range(whole(folder) + 1, steps + 1):
    put(folder, step, (step * 7 % 11) / 11)
    print(step, flush=True)
"""


def test_killed_at_random_moments_again_and_again(fast_folder):
    random.seed(5)
    reached = 0
    for _ in range(20):
        process = run_python(SAVER, fast_folder, 10**6)
        process.stdout.readline()
        time.sleep(random.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        step = whole(fast_folder)
        assert step >= max([reached, *map(int, said)])
        reached = step
    assert reached >= 20


def full_disk(folder: Path, megabytes: int):
    """A small file system of its own mounted at `folder`, None where that is not allowed."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True).returncode:
        return None
    return folder


def test_full_disk_keeps_what_is_there(tmp_path):
    disk = full_disk(tmp_path / "disk", 2)
    if disk is None:
        pytest.skip("needs the right to mount")
    try:
        put(disk, 1, size=300_000)
        with pytest.raises(UserError) as caught:
            put(disk, 2, size=300_000)
        assert "the disk is full" in caught.value.what and "it goes on from step_000001" in caught.value.remedy
        assert names(disk) == ["step_000001"] and newest_good(disk).step == 1
        shutil.rmtree(disk / "step_000001")
        put(disk, 2, size=300_000)
        assert newest_good(disk).step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIBRARIES = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from ilr_fast.checkpoint import save
from ilr_fast.errors import UserError
from test_checkpoint import Blob

class Torch(Blob):
    def save_model(self, folder):
        if self.name == "a":
            save_file({"w": torch.zeros(self.size)}, folder / "model.safetensors")
    def save_state(self, folder):
        torch.save({"w": torch.zeros(self.size)}, folder / "optimizer.pt")

folder = Path(sys.argv[1])
save(folder, 1, {"a": Torch("a", 1, 10)}, {}, keep=1, score=None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("a", "b"):
    try:
        save(folder, 2, {name: Torch(name, 2, 100_000)}, {}, keep=1, score=None)
    except UserError as error:
        print(error.what)
print(sorted(p.name for p in folder.iterdir()))
"""


def test_full_disk_is_seen_through_the_libraries_that_write(tmp_path):
    """safetensors (a) and torch's archives (b) lose the error's number; a limit on files' size stands for the disk."""
    output, _ = run_python(LIBRARIES, tmp_path).communicate(timeout=60)
    full, full_again, left = output.splitlines()
    assert full.startswith("the disk is full") and full_again.startswith("the disk is full")
    assert left == "['step_000001']"
