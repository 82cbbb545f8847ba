"""Whether the promises of docs/reliability.md hold when things go wrong.

    python -m benchmarks.faults                                    # the long form, about an hour
    python -m benchmarks.faults --kills 10 --disks 5 --flips 20    # some of it

Commands are killed, run out of disk space, read damaged files, run twice at once, and are stopped
under torchrun; then the same command must end as if nothing had happened, or have refused in one
sentence. Prints a table of promises, trials and failures; the exit code is 1 if anything failed.

A full disk is a tmpfs where this process may mount one, else a limit on the size of files.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", COLUMNS="100")

import numpy as np
from PIL import Image

from tests.forked import HANGS, Running

ROOT = Path(__file__).parent.parent
MAX_SENTENCE = 1000  # characters
NOT_COMPARED = ("*.yaml", "metrics.jsonl", "curves.png", ".lock", "*.lock")  # times, paths
LEFTOVERS = (".*.partial", ".*.removed", ".tmp*", ".[0-9]*.json")


@dataclass(frozen=True)
class Job:
    """A command that writes a folder; {work} and {out} stand for folders."""

    name: str
    words: str

    def command(self, work: Path, out: Path) -> list[str]:
        """Its words."""
        return self.words.format(work=work, out=out).split()


@dataclass(frozen=True)
class Undisturbed:
    """What a job leaves that nothing disturbs (file -> hash of its contents), and its time."""

    files: dict[str, str]
    seconds: float


def problem_of(ended: CompletedProcess[str], *allowed: int) -> str:
    """What is wrong with how a command ended, or nothing."""
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    if ended.returncode == HANGS:
        return "it hangs"
    if "Traceback" in ended.stderr:
        return f"traceback: {last[:200]}"
    if ended.returncode not in allowed:
        return f"exit code {ended.returncode} ({last[:200]})"
    if ended.returncode == 2 and len(last) > MAX_SENTENCE:
        return f"a sentence of {len(last)} characters"
    return ""


# What the commands read


def make_images(folder: Path, number: int = 40) -> None:
    """Small pictures of two classes, the same in every run."""
    generator = np.random.default_rng(0)
    for i in range(number):
        pixels = np.zeros((16, 16), np.uint8)
        top, left = generator.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = generator.integers(80, 255)
        path = folder / ("square", "other")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


TINY = "--config tiny"
TRAIN = f"train {TINY} --data.path {{work}}/photos --output-dir"
PRIOR = f"train-prior {TINY} --codes {{work}}/codes --vqvae {{work}}/vqvae --output-dir {{out}}"
PARTS = "--vqvae {work}/vqvae --priors {work}/prior_0 {work}/prior_1"
SAMPLE = f"sample --num-images 6 --output-dir {{out}} {PARTS}"
STAGES = (  # in order: later ones read what earlier ones have written
    ("vqvae", TRAIN + " {out}"),
    ("codes", "extract --vqvae {work}/vqvae --data.path {work}/photos --output-dir {out}"),
    ("prior_0", f"{PRIOR} --level top"),
    ("prior_1", f"{PRIOR} --level bottom"),
    ("pipeline", f"assemble {PARTS} --output-dir {{out}}"),
    ("prepared", "prepare --image.size 16 --image.channels 1 --image.fit pad"
     " --image.background black --shard-size 10"
     " --data.path {work}/photos --output-dir {out}"),
)  # fmt: skip
OTHERS = (
    ("discriminator", TRAIN + " {out} --discriminator.weight 0.1 --discriminator.start-step 2"
     " --discriminator.num-layers 2"),
    ("from prepared", f"train {TINY} --data.path {{work}}/prepared --output-dir {{out}}"),
    ("pixelsnail", f"{PRIOR} --level bottom --family pixelsnail"),
    ("small shards", "extract --shard-size 5 --vqvae {work}/vqvae --data.path {work}/photos"
     " --output-dir {out}"),
    ("sample", SAMPLE),
    ("reconstruct", "reconstruct --vqvae {work}/vqvae --data.path {work}/photos"
     " --output-dir {out} --num-images 6"),
)  # fmt: skip
JOBS = [Job(name, words) for name, words in (*STAGES, *OTHERS)]
READERS = (  # a folder, and the command that reads all of it
    ("vqvae", "reconstruct --vqvae {copy} --data.path {work}/photos --output-dir {out}"
     " --num-images 6"),
    ("pipeline", "sample --num-images 4 --pipeline {copy} --output-dir {out}"),
    ("prior_0", "sample --num-images 4 --vqvae {work}/vqvae --priors {copy} {work}/prior_1"
     " --output-dir {out}"),
    ("codes", f"train-prior {TINY} --num-steps 3 --codes {{copy}} --level top"
     " --output-dir {out}"),
    ("prepared", f"train {TINY} --num-steps 3 --data.path {{copy}} --output-dir {{out}}"),
    ("begun", TRAIN + " {copy}"),
)  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files in a folder that do not depend on time and place."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COMPARED):
            data = b"".join(line for line in path.open("rb") if b'"command_line": ' not in line)
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def wrong_result(folder: Path, expected: dict[str, str]) -> str:
    """How a finished folder differs from that of an undisturbed run, or nothing."""
    for pattern in LEFTOVERS:
        for path in folder.rglob(pattern):
            return f"it left {path.name} behind"
    found = contents(folder)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            state = "missing" if name not in found else "extra" if name not in expected else "other"
            return f"{state} file {name}"
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        steps: Counter[tuple] = Counter()
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            steps[row["step"], *sorted(row)] += 1
        if steps and max(steps.values()) > 1:
            return "metrics.jsonl holds a step twice"
    return ""


class Trials:
    """The trials of one promise."""

    def __init__(self, promise: str) -> None:
        self.promise, self.number, self.failures = promise, 0, list[str]()

    def add(self, name: str, problem: str, number: int = 1) -> None:
        """Count a trial, and what went wrong in it."""
        self.number += number
        if problem:
            self.failures.append(f"{name}: {problem}")
            print(f"FAILED {self.promise}: {name}: {problem}", flush=True)


class Faults:
    """The work folder, its jobs, and one method per kind of trial."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.results: dict[str, Undisturbed] = {}

    def prepare(self) -> None:
        """Make what the commands read, unless it is there."""
        if not (self.work / "photos").exists():
            make_images(self.work / "photos")
        for name, words in STAGES:
            self._undisturbed(Job(name, words))

        # A training that was killed after its last but one state.
        checkpoints = self.work / "begun" / "checkpoints"
        running = Running((TRAIN + " {out}").format(work=self.work, out=checkpoints.parent).split())
        while running.is_alive() and not (checkpoints / "step_00000008").exists():
            time.sleep(0.001)
        running.send(signal.SIGKILL)
        running.wait()
        shutil.rmtree(checkpoints / "step_00000012", ignore_errors=True)

    def _choose(self) -> tuple[Job, Undisturbed]:
        """A job, and what it leaves undisturbed."""
        job = self.random.choice(JOBS)
        return job, self._undisturbed(job)

    def _undisturbed(self, job: Job) -> Undisturbed:
        if job.name not in self.results:
            out = self.work / job.name.replace(" ", "_")
            began = time.monotonic()
            ended = Running(job.command(self.work, out)).wait()
            assert ended.returncode == 0, f"{job.name}: {ended.stderr}"
            seconds = max(1.0, time.monotonic() - began)
            self.results[job.name] = Undisturbed(contents(out), seconds)
        return self.results[job.name]

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.work, prefix="trial_"))
        try:
            yield folder / "out"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def kills(self, number: int) -> Trials:
        """SIGKILL at random moments, up to three times, then the same command."""
        trials = Trials("killed + repeated = undisturbed")
        while trials.number < number:
            job, expected = self._choose()
            with self._folder() as out:
                hits = 0
                for _ in range(self.random.randint(1, 3)):
                    running = Running(job.command(self.work, out))
                    time.sleep(self.random.uniform(0, 1.1) * expected.seconds)
                    hits += running.is_alive()
                    running.send(signal.SIGKILL)
                    running.wait()
                ended = Running(job.command(self.work, out)).wait()
                problem = problem_of(ended, 0) or wrong_result(out, expected.files)
                if hits or problem:  # else all had ended before they could be killed
                    trials.add(job.name, problem, hits)
        return trials

    def disks(self, number: int) -> Trials:
        """A disk that becomes full, then the same command with room."""
        trials = Trials("disk full: one sentence, nothing half left, continues")
        while trials.number < number:
            job, expected = self._choose()
            size = 4096 * self.random.randint(1, 60)
            with self._folder() as out, small_disk(out.parent, size) as is_tmpfs:
                limit = 0 if is_tmpfs else size // 8
                full = Running(job.command(self.work, out), max_file_size=limit).wait()
                if full.returncode == 0:
                    continue  # it had room enough
                partial = [path.name for path in out.rglob(".*.partial")]
                problem = problem_of(full, 2) or (f"{partial[0]} is left" if partial else "")
                if is_tmpfs:
                    mount(out.parent, "remount,size=64m")
                ended = Running(job.command(self.work, out)).wait()
                problem = problem or problem_of(ended, 0) or wrong_result(out, expected.files)
                trials.add(job.name, problem)
        return trials

    def flips(self, number: int) -> Trials:
        """One damaged byte in a file; then the same result as without it, or a sentence."""
        trials = Trials("a damaged byte: refused, or harmless")
        undisturbed = {}
        for name, words in READERS:
            with self._copy(name) as copy:
                out = self._output(words, copy)
                ended = Running(words.format(work=self.work, copy=copy, out=out).split()).wait()
                assert ended.returncode == 0, f"{name}: {ended.stderr}"
                undisturbed[name] = contents(out)
        for i in range(number):
            name, words = READERS[i % len(READERS)]
            with self._copy(name) as copy:
                path = self.random.choice([p for p in sorted(copy.rglob("*")) if _is_read(p)])
                place = flip(path, self.random)
                out = self._output(words, copy)
                ended = Running(words.format(work=self.work, copy=copy, out=out).split()).wait()
                problem = problem_of(ended, 0, 2)
                if not problem and ended.returncode == 0:
                    damaged = str(path.relative_to(copy))  # nothing reads it, if it stays
                    found = contents(out)
                    whole = undisturbed[name]
                    both = found.keys() | whole.keys()
                    unlike = [key for key in both if found.get(key) != whole.get(key)]
                    unlike = [key for key in unlike if key != damaged]
                    problem = f"another {unlike[0]} without a word" if unlike else ""
                trials.add(f"{name}/{path.relative_to(copy)} at byte {place}", problem)
        return trials

    @contextlib.contextmanager
    def _copy(self, name: str) -> Iterator[Path]:
        with self._folder() as out:
            yield Path(shutil.copytree(self.work / name, out))

    @staticmethod
    def _output(words: str, copy: Path) -> Path:
        """Where a reader writes: beside the copy, or into it."""
        return copy if "--output-dir {copy}" in words else copy.with_name("result")

    def pairs(self, number: int) -> Trials:
        """The same command twice at once: one does the work, the other does or refuses."""
        trials = Trials("two at once: one writes, the result is whole")
        for _ in range(number):
            job, expected = self._choose()
            with self._folder() as out:
                first = Running(job.command(self.work, out))
                time.sleep(self.random.uniform(0, 0.7) * expected.seconds)
                second = Running(job.command(self.work, out))
                ends = [first.wait(), second.wait()]
                problems = [problem_of(ended, 0, 2) for ended in ends]
                if [ended.returncode for ended in ends] == [2, 2]:
                    problems.append("both refused")
                for ended in ends:
                    if ended.returncode == 2 and "is writing" not in ended.stderr:
                        problems.append(f"misleading: {ended.stderr.strip()[-200:]}")
                problems.append(wrong_result(out, expected.files))
                trials.add(job.name, next(filter(None, problems), ""))
        return trials

    def signals(self, number: int) -> Trials:
        """SIGTERM to torchrun while two processes train with slow steps, then the same command."""
        trials = Trials("SIGTERM under torchrun: state saved, continues exactly")
        words = TRAIN + " {out} --batch-size 512 --num-steps 24 --log-every 1000"
        words += " --validate-every 24 --checkpoint-every 1000"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", "2", str(ROOT / "scripts" / "train.py")]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}

        def launch(out: Path) -> subprocess.Popen:
            command = [*launcher, *words.format(work=self.work, out=out).split()[1:]]
            return subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )

        with self._folder() as out:
            started = time.monotonic()
            text, _ = (process := launch(out)).communicate()
            assert process.returncode == 0, text.decode()
            seconds, expected = time.monotonic() - started, contents(_with_last_state(out))
        while trials.number < number:
            with self._folder() as out:
                process = launch(out)
                record = out / "train_config.yaml"
                while process.poll() is None and not record.exists():
                    time.sleep(0.05)
                time.sleep(self.random.uniform(0.1, 0.4) * seconds)
                if process.poll() is not None:
                    process.communicate()
                    continue
                process.send_signal(signal.SIGTERM)
                process.communicate()
                saved = list((out / "checkpoints").glob("step_*"))
                problem = "" if saved else "no state was saved"
                text, _ = (process := launch(out)).communicate()
                last = text.decode(errors="replace").strip()[-200:]
                problem = problem or (f"continuing failed: {last}" if process.returncode else "")
                trials.add("train", problem or wrong_result(_with_last_state(out), expected))
        return trials

    def mistakes(self, number: int) -> Trials:
        """Command lines with wrong flags, recipes and files: one sentence each."""
        trials = Trials("mistaken command lines: one sentence, the right exit code")
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.mistakes", "--trials", str(number)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
        lines = ended.stdout.splitlines()
        (table,) = [index for index, line in enumerate(lines) if line.startswith("promise:")]
        for line in lines[1:table]:
            trials.add("vqvae2", line, 0)
        trials.number = sum(int(line.split()[-2]) for line in lines[table + 1 :])
        return trials


def _with_last_state(run: Path) -> Path:
    """A finished run without its earlier states, which a stop has moved."""
    for state in sorted((run / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(state)
    return run


def _is_read(path: Path) -> bool:
    """Whether a file belongs to what commands read: not a picture or a report of figures."""
    return path.is_file() and path.suffix in (".json", ".safetensors", ".parquet", ".yaml")


def flip(path: Path, generator: random.Random) -> int:
    """Change one byte of a file; returns its place."""
    data = bytearray(path.read_bytes())
    place = generator.randrange(len(data))
    data[place] ^= generator.randint(1, 255)
    path.write_bytes(bytes(data))
    return place


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Put a disk of this many bytes into a folder's place; whether that is allowed."""
    is_tmpfs = mount(folder, f"size={size}")
    try:
        yield is_tmpfs
    finally:
        if is_tmpfs:
            subprocess.run(["umount", "-l", folder], check=True)


def mount(folder: Path, options: str) -> bool:
    """Mount a tmpfs, or say that this process may not."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return not subprocess.run(words, capture_output=True, check=False).returncode


def main() -> int:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"kills": 300, "disks": 135, "flips": 600, "pairs": 60, "signals": 40, "mistakes": 500}
    for kind, number in kinds.items():
        parser.add_argument(f"--{kind}", type=int, default=None, help=f"long form: {number}")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    seed = given.pop("seed")
    if all(number is None for number in given.values()):
        given = kinds

    table = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/cache"
        faults = Faults(Path(folder), seed)
        faults.prepare()
        for kind, number in given.items():
            if number:
                began = time.monotonic()
                table.append(getattr(faults, kind)(number))
                print(f"{kind}: {time.monotonic() - began:.0f} s", flush=True)

    width = max(len(trials.promise) for trials in table)
    print(f"{'promise':<{width}}  trials  failures")
    for trials in table:
        print(f"{trials.promise:<{width}}  {trials.number:6}  {len(trials.failures):8}")
    return int(any(trials.failures for trials in table))


if __name__ == "__main__":
    sys.exit(main())
