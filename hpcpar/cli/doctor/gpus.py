"""Does torch see the GPUs, has each rank one of its own, and does MPI harm what is in their memory?"""

from __future__ import annotations

from collections.abc import Iterator

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, error, name_ranks, ok, spread, warning

__all__ = ["CHECKS"]


def _seen(job: JobFacts) -> Iterator[Finding]:
    """Torch sees the GPUs of the machine."""
    for facts, where in spread(job, lambda facts: (facts.gpus, facts.gpu_devices, facts.has_kfd)):
        built = facts.abilities.get("GPU support in torch")
        if facts.gpus:
            yield ok(f"torch sees {len(facts.gpus)} GPU(s){where}: {', '.join(sorted(set(facts.gpus)))}")
        elif facts.gpu_devices or (facts.has_kfd and built):
            which = f"{facts.gpu_devices} GPU(s)" if facts.gpu_devices else "/dev/kfd, of an AMD GPU,"
            yield warning(
                f"{facts.host} has {which} in /dev, torch sees none{where}",
                "torch finds no driver that fits, or CUDA_VISIBLE_DEVICES (ROCR_VISIBLE_DEVICES) hides them."
                if built
                else "This torch was built for the CPU only.",
                "nvidia-smi (rocm-smi) shows the driver's version; the wheel must not need a newer one."
                if built
                else "pip install torch without the CPU index, for the CUDA of the driver.",
            )
        elif facts.has_kfd:
            yield ok(
                f"{facts.host} has /dev/kfd: an AMD GPU, or only the graphics inside the processor. This "
                "torch "
                "is for the CPU"
            )


def _own(job: JobFacts) -> Iterator[Finding]:
    """Each rank of a machine has a GPU of its own, the one with the rank's number there."""
    for numbers in job.machines.values():
        owners: dict[str, list[int]] = {}
        for place, number in enumerate(numbers):
            facts = job.ranks[number]
            names = [identity for identity in facts.gpu_ids if identity]
            if names:
                owners.setdefault(names[place % len(names)], []).append(number)
        crowded = [ranks for ranks in owners.values() if len(ranks) > 1]
        facts = job.ranks[numbers[0]]
        if crowded:
            more = f", and {len(crowded) - 1} more GPU(s) as well" if len(crowded) > 1 else ""
            yield warning(
                f"{name_ranks(crowded[0])} on {facts.host} have one GPU in common{more}",
                "They take turns, and each keeps its own copy of the model in the GPU's memory.",
                "Start as many ranks per node as it has GPUs, and let each see all (unset "
                "CUDA_VISIBLE_DEVICES), or one of its own: Slurm `--gpus-per-task=1 --gpu-bind=none`.",
            )
        elif owners:
            yield ok(f"each rank on {facts.host} has a GPU of its own")


def _messages(job: JobFacts) -> Iterator[Finding]:
    """A library that claims to take device buffers must not harm them."""
    facts = job.first
    if job.gpu is not None and job.gpu.wrong:
        yield error(
            job.gpu.summary,
            "Programs that hand device buffers to MPI compute with wrong data. hpcpar hands over none: "
            "it goes "
            "by pinned host memory, and is safe.",
            "Do not use this MPI with device buffers; report it to the site. Known cures: "
            "UCX_MEMTYPE_CACHE=n "
            "(UCX), another version of the library.",
        )
    elif job.gpu is not None:
        yield ok(job.gpu.summary)
    elif facts.gpus:
        claim = facts.mpi.gpu_claim if facts.mpi else None
        said = {True: "claims", False: "denies", None: "does not say"}[claim]
        yield ok(f"device buffers were not tried: MPI {said} that it takes them; hpcpar needs it not")


CHECKS = (
    Check("gpus.seen", _seen),
    Check("gpus.own", _own),
    Check("gpus.messages", _messages),
)
