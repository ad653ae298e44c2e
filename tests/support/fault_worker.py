"""Trainings that are killed. One process imports everything and forks, so that a kill costs no import.

python tests/support/fault_worker.py FOLDER MODE[:NUMBER...] ...    prints what happened, mode by mode, e.g.
python tests/support/fault_worker.py /tmp/faults kills:100:0 kills:30:1:2 every

kills:COUNT:SEED[:PROCESSES[:ENGINE]]
                               SIGKILL at random moments, most of them while a checkpoint is being written, to one of
                               the processes, until COUNT have died; ENGINE is one of tests/support/parity.py
every[:STEPS[:STRIDE]]         SIGKILL before every single change that a training makes in its folder, or each STRIDE-th
late                           SIGKILL to a process that saves later than the first
replace:"OLD by NEW"           SIGKILL before every single change of a save over an older model, both `whole`,
                               `sharded` or `adapter`
terminate[:PROCESSES]          SIGTERM to the last process
agree                          two processes in a folder with newer checkpoints
train                          one training in FOLDER/run, not forked: alone or under torchrun
resume[:FOLDER]                continues that training, of two processes, in FOLDER/FOLDER/run
"""

import contextlib
import copy
import faulthandler
import gc
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # also as a program
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel, get_peft_model
from support.forking import exit_after
from support.models import examples, tiny_llama
from support.parity import ENGINES
from support.runs import settings
from tqdm import tqdm
from transformers import AutoModelForCausalLM, TrainerCallback

from blur_trainer.saving.checkpoints import last_complete_checkpoint
from blur_trainer.saving.output_dir import staged
from blur_trainer.trainers.blur import BLURTrainer
from blur_trainer.trainers.ending import TrainingInterrupted

FORGET, RETAIN = examples(7), examples(5, 1)
tqdm.set_lock(threading.RLock())  # the default one is shared by all forks: a killed child would keep it
tqdm.monitor_interval = 0  # no thread that holds it while we fork
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # and "open" for writing


def make(
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
    eval_dataset: Any = None,
    engine: str = "ddp",
    **config: Any,
) -> BLURTrainer:
    """A checkpoint each step, only one kept: nothing to fall back on if it is lost."""
    defaults = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    defaults |= {"ddp_find_unused_parameters": False} | copy.deepcopy(ENGINES[engine])
    args = settings(folder, **({"use_cpu": "deepspeed" not in defaults} | defaults | config))
    return BLURTrainer(tiny_llama(dropout=0.2), args, FORGET, RETAIN, eval_dataset=eval_dataset, callbacks=callbacks)


def run(folder: Path, begins: Callable[[], None] = lambda: None, **config: Any) -> int:
    """Starts or continues the training and saves the model; what a user's script does."""
    begun = folder.exists() and any(folder.iterdir())
    trainer = make(folder, **config)
    begins()
    try:
        trainer.train(resume_from_checkpoint=True if begun else None)
    except TrainingInterrupted as interrupted:
        return interrupted.code
    trainer.save_model()
    return 0


class Slow(TrainerCallback):
    """Time for a signal to arrive."""

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.2)


def forked(work: Callable[[], int], log: Path, **environment: str) -> int:
    """`work` in a child, its exit code what `work` returns; the child's id."""
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    faulthandler.dump_traceback_later(30)  # into the log, if it hangs
    signal.alarm(60)  # the end of it then: also of a child whose parent is gone
    exit_after(work)


def waited(child: int, seconds: float = 90.0) -> int | None:
    """The exit code, negative for a signal; None if it still runs, which no child does after a minute."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


class Launch:
    """One training in `processes` forked processes, which tell through a pipe when training begins."""

    def __init__(
        self, folder: Path, processes: int = 1, before: Callable[[int], Any] = lambda rank: None, **config: Any
    ):
        ready, told = os.pipe()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.children = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}

            def work(rank: int = rank) -> int:
                before(rank)
                return run(folder, lambda: os.close(told), **config)

            environment = ranks | network if processes > 1 else {}
            self.children.append(forked(work, folder.with_suffix(f".{rank}.log"), **environment))
        os.close(told)
        if not select.select([ready], [], [], 60)[0]:  # readable when every process has closed it
            raise AssertionError(f"no training begins, see {folder}.*.log")
        os.close(ready)

    def finished(self) -> list[int | None]:
        return [waited(child) for child in self.children]

    def killed(self, rank: int) -> list[int | None]:
        """SIGKILL to one of them; the others end by themselves, or are killed as a launcher would."""
        kill(self.children[rank])
        codes = []
        for child in self.children:
            code = waited(child, 5.0)
            if code is None:
                kill(child)
                code = waited(child)
            codes.append(code)
        return codes


def until(happened: Callable[[], Any], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)
    return bool(happened())


def saving(folder: Path) -> bool:
    """A checkpoint is being written."""
    manifests = []
    for path in folder.glob("checkpoint-*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            manifests.append((path / "blur_checkpoint.json").read_text())
    return any("null" in manifest for manifest in manifests)


def newest(folder: Path) -> int:
    try:
        return int(last_complete_checkpoint(str(folder)).rsplit("-", 1)[1])
    except ValueError:
        return 0


def outcome(folder: Path) -> tuple[bytes, list[dict[str, float]]]:
    """The final weights, byte by byte, and the log, without what depends on the clock."""
    checkpoint = last_complete_checkpoint(str(folder))  # a kill before the last rotation leaves an older one too
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if leftovers:
        raise AssertionError(f"left behind: {leftovers}")
    return (folder / "model.safetensors").read_bytes(), [entry for entry in history if "loss" in entry]


def uninterrupted(folder: Path, processes: int = 1, **config: Any) -> tuple[Any, float]:
    launch, start = Launch(folder, processes, **config), time.monotonic()
    codes = launch.finished()
    if any(codes):
        raise AssertionError(f"exit codes {codes}: {folder.with_suffix('.0.log').read_text()[-3000:]}")
    return outcome(folder), time.monotonic() - start


def aim(folder: Path, dice: random.Random, step: int, steps: int, seconds: float) -> None:
    """Waits for a random moment of the training, or of one of the saves that are still to come."""
    if step == steps or dice.random() < 0.3:
        time.sleep(dice.uniform(0, seconds))
    else:
        until((folder / f"checkpoint-{dice.randint(step + 1, steps)}").exists, seconds)
        time.sleep(dice.uniform(0, 0.01))


def kills(folder: Path, count: int, seed: int, processes: int = 1, engine: str = "ddp") -> dict[str, Any]:
    """Trainings killed again and again until they end; each must end where the uninterrupted one does."""
    config = {"engine": engine} | ({} if engine == "ddp" else {"max_steps": 4})
    expected, seconds = uninterrupted(folder / "whole", processes, **config)
    dice = random.Random(seed)
    told = {"kills": 0, "trainings": 0, "during a save": 0, "before the first checkpoint": 0, "hung": 0, "lost": 0}
    while told["kills"] < count:
        current, step = folder / f"run-{told['trainings']}", 0
        while True:
            launch = Launch(current, processes, **config)
            if told["kills"] == count:
                codes = launch.finished()
            else:
                aim(current, dice, step, len(expected[1]), seconds)
                codes = launch.killed(dice.randrange(processes))
            if -signal.SIGKILL in codes:
                told["kills"] += 1
                told["hung"] += codes.count(-signal.SIGKILL) - 1
                told["during a save"] += saving(current)
                told["before the first checkpoint"] += newest(current) == 0
            elif any(codes):
                raise AssertionError(f"exit codes {codes}, see {current}.*.log")
            told["lost"] += newest(current) < step
            step = newest(current)
            if not any(codes):
                break
        told["lost"] += outcome(current) != expected
        told["trainings"] += 1
    return told


def changes(folder: Path, kill_at: int | None) -> list[str]:
    """Counts this process's changes in `folder` from now on; before the one numbered `kill_at` it is gone."""
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (event in CHANGES or opened):
            return
        path = str(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # shutil.rmtree: a name in an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if path.startswith(str(folder)):
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{event} {path}")

    sys.addaudithook(watch)
    return seen


def every(folder: Path, steps: int = 2, stride: int = 1) -> dict[str, Any]:
    """One training per change (or each `stride`-th) to the folder, killed right before it, then continued."""
    config = {"max_steps": steps}
    expected, _ = uninterrupted(folder / "whole", **config)
    told, step = {"kills": 0, "lost": 0}, 0
    while True:
        current = folder / f"run-{told['kills']}"
        launch = Launch(current, before=lambda rank: changes(current, stride * told["kills"]), **config)  # noqa: B023
        codes = launch.finished()
        if codes == [0]:
            return told
        if codes != [-signal.SIGKILL]:
            raise AssertionError(f"exit codes {codes}, see {current}.*.log")
        told["kills"] += 1
        told["lost"] += newest(current) < step  # a later kill leaves no less
        step = newest(current)
        told["lost"] += Launch(current, **config).finished() != [0] or outcome(current) != expected


def late(folder: Path) -> dict[str, Any]:
    """The first process has written its `trainer_state.json`, the second not yet its part: no complete checkpoint."""
    expected, _ = uninterrupted(folder / "whole", 2)
    current = folder / "run"

    def slow(rank: int) -> None:
        save = torch.save

        def later(content: Any, path: Any, *args: Any) -> None:
            if rank == 1 and "checkpoint-3" in str(path):
                time.sleep(60)
            save(content, path, *args)

        torch.save = later

    launch = Launch(current, 2, before=slow)
    until((current / "checkpoint-3" / "trainer_state.json").exists)
    time.sleep(0.5)  # whatever the first process does without waiting for the second
    codes = launch.killed(1)
    left = newest(current)
    resumed = Launch(current, 2).finished()
    return {"codes": codes, "complete": left, "resumed": resumed, "equal": outcome(current) == expected}


def terminate(folder: Path, processes: int = 1) -> dict[str, Any]:
    expected, _ = uninterrupted(folder / "whole", processes)
    launch = Launch(folder / "run", processes, callbacks=[Slow()])
    until(lambda: newest(folder / "run"))
    os.kill(launch.children[-1], signal.SIGTERM)
    codes, left = launch.finished(), newest(folder / "run")
    resumed = Launch(folder / "run", processes).finished()
    return {"codes": codes, "complete": left, "resumed": resumed, "equal": outcome(folder / "run") == expected}


def train(folder: Path) -> None:
    """Until the process ends."""
    (folder / f"process-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    code = run(folder / "run", callbacks=[Slow()])
    PartialState().wait_for_everyone()
    os._exit(code)  # see tests/support/engine_worker.py


def resume(folder: Path, name: str = "") -> dict[str, Any]:
    folder = folder / name
    expected, _ = uninterrupted(folder / "whole", 2)
    left = newest(folder / "run")
    codes = Launch(folder / "run", 2).finished()
    return {"complete": left, "codes": codes, "equal": outcome(folder / "run") == expected}


def agree(folder: Path) -> dict[str, Any]:
    """What only the first process sees is an error on all of them, at once."""
    uninterrupted(folder / "run", 2)

    def forget(rank: int) -> None:
        global run
        run = lambda folder, begins, **config: (begins(), make(folder).train())[0] or 0  # noqa: E731

    codes = Launch(folder / "run", 2, before=forget).finished()
    logs = [(folder / f"run.{rank}.log").read_text() for rank in (0, 1)]
    return {"codes": codes, "told": ["already holds a run" in log for log in logs]}


def adapter(seed: int) -> PeftModel:
    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


KINDS: dict[str, tuple[Callable[[int], Any], dict[str, str]]] = {
    "whole": (tiny_llama, {"max_shard_size": "50GB"}),
    "sharded": (tiny_llama, {"max_shard_size": "16KB"}),
    "adapter": (adapter, {}),
}
REPLACED = ("whole by whole", "whole by sharded", "sharded by whole", "sharded by sharded", "adapter by adapter")
OUTCOMES = ("neither", "old", "new")


def replace(folder: Path, case: str) -> dict[str, Any]:
    """Killed before each change that a save makes: the folder must load the old or the new weights, never a mixture."""
    old, new = case.split(" by ")
    target = folder / "model"
    told: dict[str, Any] = {"kills": 0, "neither": 0, "old": 0, "new": 0, "left over": []}
    build, options = KINDS[old]
    log, older = target.with_suffix(".log"), target.with_suffix(".older")
    build(1).save_pretrained(older, **options)

    def loaded_and_saved_again() -> int:
        """What is there, and what after another save: one child for both, as threads that load must not be forked."""
        found = load(target, new)
        save(target, new)
        return 1 + 3 * found + load(target, new)

    for kill_at in range(1000):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(older, target)
        code = waited(forked(lambda: save(target, new, kill_at), log))  # noqa: B023
        left = waited(forked(loaded_and_saved_again, log))
        if code not in (0, -signal.SIGKILL) or left is None or left < 1:
            raise AssertionError(log.read_text())
        found, again = divmod(left - 1, 3)
        told[OUTCOMES[found]] += 1
        told["neither"] += OUTCOMES[again] != "new"
        weights = sorted(path.name for path in target.iterdir() if "safetensors" in path.name)
        told["left over"] += [name for name in weights if name not in used(target)]
        if code == 0:
            return told
        told["kills"] += 1
    raise AssertionError("the save has no end")


def save(target: Path, kind: str, kill_at: int | None = None) -> int:
    build, options = KINDS[kind]
    model = build(2)
    if kill_at is not None:
        changes(target, kill_at)
    with staged(str(target), writes=True) as staging:
        model.save_pretrained(staging, **options)
    return 0


def used(target: Path) -> set[str]:
    index = target / "model.safetensors.index.json"
    if index.exists():
        return {index.name, *json.loads(index.read_text())["weight_map"].values()}
    return {"adapter_model.safetensors" if (target / "adapter_config.json").exists() else "model.safetensors"}


def load(target: Path, kind: str) -> int:
    """0 where these are no weights that were ever saved there, 1 for the old, 2 for the new ones."""
    model: Any
    if kind == "adapter":
        model = PeftModel.from_pretrained(tiny_llama(), target)
    else:
        model = AutoModelForCausalLM.from_pretrained(target)
    weights = model.state_dict()
    for seed in (1, 2):
        if all(torch.equal(value, weights[key]) for key, value in KINDS[kind][0](seed).state_dict().items()):
            return seed
    return 0


MODES: tuple[Callable[..., Any], ...] = (kills, every, late, replace, terminate, agree, resume, train)


def warm_up() -> None:
    """What is imported and built on first use, once instead of in every child."""
    with tempfile.TemporaryDirectory() as folder:
        extract_model_from_parallel(tiny_llama()).save_pretrained(folder)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    told = {}
    for request in sys.argv[2:]:
        mode, *numbers = request.split(":")
        function = next(function for function in MODES if function.__name__ == mode)
        place = Path(sys.argv[1]) / ("" if function in (resume, train) else request.replace(":", "-").replace(" ", "-"))
        place.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        told[request] = function(place, *(int(n) if n.isdigit() else n for n in numbers))
        told[request]["seconds"] = round(time.monotonic() - start, 1)
    sys.stdout.write(json.dumps(told) + "\n")
