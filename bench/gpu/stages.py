"""The stages of a call, in order: the jobs of each, how many run at once, and the time limit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from .runner import Job

PYTHON = os.environ.get("PYTHON", sys.executable)
TOTAL = 555  # seconds by which the last stage has ended; the call has 570
MOST_GIB = 60.0  # of the card, all processes together
_CONTEXT_GIB = 0.7  # of a process, beside what torch allocates
_LEAST_GIB = 2.0  # that a process of the tests needs, its context included
_AT_ONCE = 14  # processes: 16 cores, and each compiles

# The tests that run kernels, graphs and pipelines, the ops' first.
TESTS = (
    "tests/ops",
    "tests/models/test_one_launch.py",
    "tests/flows_unet/test_fused_blocks.py",
    "tests/laws/test_fusion.py",
    "tests/accelerate/test_whole.py",
    "tests/models/test_sampling_stream.py",
)
DRY_SMOKE = ("op:low_rank", "case:coupling_stack", "models")
DRY_TESTS = ("tests/ops/test_low_rank_kernel.py", "-k", "half_precision or opcheck")
_SMOKE_DONE = r"\d+ right"
# How many processes share the checks of a name: where one would compile kernels for longer than the stage lasts.
SMOKE_PARTS = {
    **{"op:coupling_stack": 6, "op:conv2d_fused": 3, "op:mlp_coupling": 2, "op:linearizer_stack": 3},
    **{"case:coupling_stack": 4, "case:linearizer": 4, "case:coupling_flow": 3, "case:conv2d_fused": 3},
}
TEST_SECONDS = 45
FLOWS = ("linearizer", "coupling_flow")  # timed first: the most important cases
COMPILED = {"linearizer": "64 8 128 1048576", "coupling_flow": "262144"}  # the second call: sizes with these words
NEXT = (
    *("density", "residual_mlp", "coupling_stack", "rq_spline", "masked_autoregressive", "streams", "libraries"),
    *("latent_matmul", "conv2d_fused"),
)
NOT_TIMED = ("peers",)  # coupling_flow against other libraries, at sizes for a CPU
PROFILED = ("affine_coupling", "group_norm_silu", "coupling_flow")
CASE_SECONDS = {"linearizer": 90}  # after which the benchmark of a case is stopped
OTHER_SECONDS = 45  # of the other cases
COUNTED = {  # one kernel of each, in ncu, at sizes with these words: ncu's report is printed when a process ends
    "coupling_stack": "forward fast 64 8 128 65536",
    "linearizer": "forward exact 64 8 128 16384",
    "affine_coupling": "forward",
}


@dataclass(frozen=True)
class Machine:
    """The machine, as the first stage found it.

    Args:
        device: "cuda" or "cpu".
        total_gib, free_gib: of the card; 0 without one.
        capped: whether torch limits a process to its share of the memory.
        ops, cases: the names of the smoke tests and of the benchmark cases.
        kernels: the functions that the sanitizer checks.
    """

    device: str = "cpu"
    name: str = "no GPU"
    total_gib: float = 0.0
    free_gib: float = 0.0
    capped: bool = False
    ops: Sequence[str] = ()
    cases: Sequence[str] = ()
    kernels: Sequence[str] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was found; otherwise this is a dry run."""
        return self.device == "cuda"

    @property
    def gib(self) -> float:
        """GiB of the card that all processes together may use."""
        return min(MOST_GIB, 0.9 * self.free_gib)

    def at_once(self, most: int) -> int:
        """How many processes may share the card, ``most`` at most."""
        if not self.on_gpu:
            return min(most, 2)
        return max(1, min(most if self.capped else 4, math.floor(self.gib / _LEAST_GIB)))

    def share(self, processes: int) -> dict[str, str]:
        """The environment variable that limits each of ``processes`` processes to its share of the memory."""
        if not self.on_gpu or not self.capped:
            return {}
        fraction = max(self.gib / processes - _CONTEXT_GIB, 0.1) / self.total_gib
        return {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{fraction:.4f}"}


@dataclass(frozen=True)
class Given:
    """The input of a stage's jobs.

    ``share`` are environment variables of each job, ``work`` is a temporary folder.
    """

    machine: Machine
    share: Mapping[str, str]
    out: Path
    work: Path


@dataclass(frozen=True)
class Stage:
    """A part of the call.

    Args:
        until: seconds after the start of the call at which the stage is stopped.
        log: the file its output goes to.
        jobs: makes its jobs.
        most: the most processes at once.
        problem: why it does less than it should on this machine, if it does.
    """

    name: str
    until: float
    log: str
    jobs: Callable[[Given], Sequence[Job]]
    most: int = 1
    problem: str | None = None


FILES = (
    *("summary.txt", "environment.txt", "smoke.jsonl", "tests.log", "memcheck.log"),
    *("bench.log", "results.jsonl", "trace.json.gz"),
)  # as many as come back from the machine


def plan(compile: bool) -> list[Stage]:
    """The stages of a call, or of the second one that times torch.compile."""
    probe = [Job("probe", _module("tests.gpu.probe"))]
    environment = Stage("environment", 30, "environment.txt", lambda given: probe)
    table = Stage("table", 170 if compile else TOTAL, "bench.log", _table)
    if compile:
        compiled = Stage("bench", 155, "bench.log", lambda given: _cases(given, FLOWS, "--compile"))
        return [environment, compiled, table]
    return [
        environment,
        Stage("smoke", 100, "smoke.jsonl", _smoke, _AT_ONCE),
        Stage("tests", 235, "tests.log", _tests, _AT_ONCE),
        Stage("memcheck", 270, "memcheck.log", _memcheck, 8, _without("compute-sanitizer", "memory is checked")),
        Stage("bench", 490, "bench.log", _bench),
        Stage("profile", 540, "bench.log", _profile, problem=_without("ncu", "counters are read")),
        table,
    ]


def _without(tool: str, costs: str) -> str | None:
    return None if which(tool) else f"{tool} is missing: no kernel's {costs}"


def _module(module: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", module, *arguments]


def _smoke(given: Given) -> list[Job]:
    environment = {**given.share, **({} if given.machine.on_gpu else {"TRITON_INTERPRET": "1"})}
    names = [name for name in given.machine.ops if given.machine.on_gpu or name in DRY_SMOKE]
    slowest_first = sorted(names, key=lambda name: -SMOKE_PARTS.get(name, 1))
    jobs = []
    for name in slowest_first:
        for i in range(parts := SMOKE_PARTS.get(name, 1) if given.machine.on_gpu else 1):
            command = _module("tests.gpu.smoke", name, "--part", f"{i}/{parts}")
            jobs.append(
                Job(f"{name} {i + 1}/{parts}" if parts > 1 else name, command, environment, done=_SMOKE_DONE)
            )
    return jobs


def _tests(given: Given) -> list[Job]:
    """One pytest, whose worker processes are all that this stage may run at once."""
    on_gpu, processes = given.machine.on_gpu, str(given.machine.at_once(_AT_ONCE))
    options = ["-p", "tests.gpu.plugin", "--tb=short", "--no-summary", "--no-header"]
    if on_gpu and find_spec("xdist"):
        options += ["-n", processes, "--dist", "worksteal", "--max-worker-restart", "200"]
    if find_spec("pytest_timeout"):  # "thread" ends a process that waits for a hung card; no signal reaches it
        options += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread" if on_gpu else "signal"]
    return [Job("tests", _module("pytest", *options, *(TESTS if on_gpu else DRY_TESTS)), given.share)]


def _memcheck(given: Given) -> list[Job]:
    """compute-sanitizer on each op, without torch's caching allocator, which hides reads past a tensor's end."""
    tool = which("compute-sanitizer")
    if tool is None or not given.machine.on_gpu:
        return []
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--print-limit", "20"]
    ours = [option for name in given.machine.kernels for option in ("--kernel-name", f"kernel_name={name}")]
    command += ["--error-exitcode", "9", *ours, *_module("tests.gpu.smoke")]
    ops = [name for name in given.machine.ops if name.startswith("op:")]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [Job(f"memcheck {name}", [*command, name], uncached) for name in ops]


def _bench(given: Given) -> list[Job]:
    """The benchmark cases, the most important first."""
    first = (*FLOWS, *NEXT)
    rest = [case for case in given.machine.cases if case not in (*first, *NOT_TIMED)]
    return _cases(given, (*first, *rest), "--no-compile")


def _cases(given: Given, cases: Sequence[str], compile: str) -> list[Job]:
    """One process per case, so that a crash or a hang loses only this case.

    A process that has printed its last lines, which explain its columns, has succeeded, whatever its exit status.
    """
    sizes = ["--sizes", "gpu"] if given.machine.on_gpu else ["--sizes", "tiny", "--budget", "0.02"]
    options = ("--device", given.machine.device, *sizes, "--json", "/dev/stdout", compile)
    jobs = []
    for case in (case for case in cases if case in given.machine.cases):
        few = ("--only", COMPILED[case]) if compile == "--compile" and given.machine.on_gpu else ()
        command = _module("linfast.bench", *options, f"--case={case}", *few)
        limit = CASE_SECONDS.get(case, OTHER_SECONDS)
        jobs.append(Job(case, command, given.share, done="x base:", limit=limit))
    return jobs


def _profile(given: Given) -> list[Job]:
    sizes = "gpu" if given.machine.on_gpu else "tiny"
    bench = _module("linfast.bench", "--device", given.machine.device, "--no-compile", "--sizes", sizes)
    traced = [*bench, "--profile", str(given.work / "profile"), *(f"--case={case}" for case in PROFILED)]
    jobs = [Job("profile", traced, given.share)]
    if (ncu := which("ncu")) and given.machine.on_gpu:
        ours = f"regex:^({'|'.join(given.machine.kernels)})$"
        settings = ["--set", "detailed", "--clock-control", "none", "--launch-count", "1", "--kill", "yes"]
        counted = [ncu, *settings, "--kernel-name", ours]
        jobs += [
            Job(
                f"ncu {case}",
                [*counted, *bench, "--check", f"--case={case}", "--only", words],
                given.share,
                done=r"\s*Duration\b",
                limit=20,
            )
            for case, words in COUNTED.items()
        ]
    return jobs


def _table(given: Given) -> list[Job]:
    return [Job("table", _module("linfast.bench.report", str(given.out / "results.jsonl")))]
