"""How many jobs at once, with how many threads: the rule of `--jobs auto`.

The rule is written down, not timed: threads decide last bits, and two runs must not differ because a machine was busy.
It was found on 2 cores (seconds of four splits, or two of EfficientNet-B0; all with start and end of the command):

======================  ========  ===================  ========================  =====
model                   pixels    one job, 2 threads   two jobs, a thread each   ratio
======================  ========  ===================  ========================  =====
LeNet-5                 28 x 28   44.7                 31.2                      0.70
VGGNet                  28 x 28   57.1                 55.2                      0.97
LeNet-5                 128 x 128 35.2                 33.0                      0.94
ResNetCNN               128 x 128 40.6                 39.1                      0.96
EfficientNet-B0         128 x 128 62.2                 60.8                      0.98
======================  ========  ===================  ========================  =====

So a job a core is never slower while all cores have one, and much faster for small models. But the last jobs of a
large model may leave cores idle for long: then one job with all threads ends earlier. With more cores the rule follows
Amdahl's law: of a job that takes one thread the time 1, k threads leave s + (1 - s) / k, and s = 1 / ratio - 1.

How long a job takes, compared with others, follows the values that its layers put out, since training waits for memory;
the multiply-accumulates say little. Photos of task 2, two jobs of a thread each, median epoch:

=================  =======  ==========================  ===================
model              seconds  s per million outputs       s per billion MACs
=================  =======  ==========================  ===================
LeNet-5            3.75     24                          211
VGGNet             16.5     27                          104
ResNetCNN          17.2     32                          74
EfficientNet-Lite  33.2     26                          966
EfficientNet-B0    79.5     36                          631
=================  =======  ==========================  ===================

On the garments of task 3 it is rougher: an epoch of VGGNet and of ResNetCNN takes 3.5 and 3.6 times as long as one of
LeNet-5, where this rule says 5.2 and 3.0.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from joblib.externals.loky import cpu_count

from experiments.training import hardware
from models import ModelCard

SMALL = 1e6  # multiply-accumulates of an image below which a second thread finds little to do
SERIAL_SMALL, SERIAL = 0.43, 0.03  # share of a job that more threads do not shorten
OVERHEAD = 4e3  # cost of a job besides its layers, in output values of an image
SHARE = 0.8  # of all memory, not of free memory: other processes must not decide how many threads a job has
# memory of a job, in bytes: calibrated on the peaks in benchmarks/README.md
BASE = 1.3e9  # the libraries, the memory that the allocator keeps, one batch of images
PER_OUTPUT = 8  # of each value that a layer puts out for a batch: it, its normalised form, and a gradient, in bf16
BASE_ON_GPU = 1e9  # context, libraries, recorded passes
MOST_ON_GPU = 4  # jobs of one GPU, which takes turns between processes: there is no more host work to hide then


class Load(NamedTuple):
    """A job as far as its cost goes."""

    card: ModelCard
    batch: int  # images


@dataclass(frozen=True)
class Concurrency:
    """Jobs at once, CPU threads of each, and why."""

    at_once: int
    threads: int
    why: str = ""


def decide(
    jobs: int | None, threads: int | None, device: str, loads: Sequence[Load], on_cluster: bool = False
) -> Concurrency:
    """Decide how many jobs are done at once; `loads` has one entry for each job.

    `jobs` and `threads` are as asked for. None chooses the jobs; None threads are OMP_NUM_THREADS if that is set, and
    else the cores are shared among the jobs. A cluster itself knows how many of the jobs it has room for.
    """
    count = len(loads)
    if on_cluster:
        return Concurrency(min(jobs or count, count), threads or 1)
    all_threads = torch.get_num_threads()  # OMP_NUM_THREADS, or all cores
    if os.environ.get("OMP_NUM_THREADS"):
        threads = threads or all_threads
    cores = cpu_count()  # that this process may use
    if jobs is not None:
        at_once = min(jobs, count)
        return Concurrency(at_once, threads or (all_threads if at_once == 1 else max(1, cores // at_once)))
    if torch.device(device).type == "mps":
        return Concurrency(1, threads or all_threads, "auto: one job has the GPU")
    on_gpu = torch.device(device).type == "cuda"
    most = max(_memory(load, on_gpu) for load in loads)
    fit = max(1, int(SHARE * hardware.memory_of(device) / most))
    if on_gpu:
        at_once = min(count, fit, MOST_ON_GPU, max(1, cores // 2))
        return Concurrency(at_once, threads or max(1, cores // at_once), f"auto: {at_once} jobs share the GPU")
    at_once = min(count, fit, max(1, cores // (threads or 1)))
    if at_once == 1:
        why = "auto: one core" if cores == 1 else "auto: one job" if count == 1 else "auto: memory for one job"
        return Concurrency(1, threads or all_threads, why)
    each = threads or max(1, cores // at_once)
    if threads is None and _ends(1, all_threads, loads) < _ends(at_once, each, loads):
        why = f"auto: one job with all {all_threads} threads, so that no core is idle at the end"
        return Concurrency(1, all_threads, why)
    return Concurrency(at_once, each, f"auto: {at_once} jobs at once, {each} thread{'s' * (each > 1)} each")


def cost(card: ModelCard) -> float:
    """Cost of a job of a model, to compare it with others of the same command."""
    return card.outputs + OVERHEAD


def _ends(at_once: int, threads: int, loads: Sequence[Load]) -> float:
    """When the last job ends, the longest being begun first, in the unit of `cost` on one thread."""
    ends = [0.0] * at_once
    for card in sorted((load.card for load in loads), key=cost, reverse=True):
        serial = SERIAL_SMALL if card.macs < SMALL else SERIAL
        ends[ends.index(min(ends))] += cost(card) * (serial + (1 - serial) / threads)
    return max(ends)


def _memory(load: Load, on_gpu: bool) -> float:
    """Memory of a job at most, without the images, which all share (on a GPU each job has its own)."""
    return (BASE_ON_GPU if on_gpu else BASE) + PER_OUTPUT * load.card.outputs * load.batch
