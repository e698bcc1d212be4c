"""Starts the ranks of a training run, on this machine through torchrun or on a cluster through Slurm, and watches over
it. This package imports no code of the model.

    __main__  the command line
    local     starts a run on this machine, or on several without Slurm
    submit    submits a run to Slurm
    job       what a Slurm job does on each of its nodes
    ranks     starts torchrun on one node, and passes signals to its ranks
    agent     torchrun itself, with the exit code of its ranks
    record    remembers what started a run, and asks Slurm about its jobs
    watch     shows the state and the log of a run, and cancels it
"""
