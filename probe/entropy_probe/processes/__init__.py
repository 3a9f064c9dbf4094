"""Several processes under torchrun: who they are, what they send one another, and whether they are
alive.

torchrun    which process this is, by the environment alone
world       the processes of a measurement: shares of the prompts, sums over all, an error of all
connection  what joins them: sums over gloo, watched by the pulse
one_copy    memory that all processes of one machine see
pulse       a thread of its own that tells a process that waits from one that died
apart       a command in a process of its own
of_training the processes of a training, which its trainer has joined
"""
