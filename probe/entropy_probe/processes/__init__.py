"""Several processes under torchrun: who they are, what they send one another, and whether they are still alive.

torchrun  which process this is, by the environment alone
world     the processes of a measurement: shares of the prompts, sums over all
pulse     a thread of its own that tells a process that waits from one that died
"""
