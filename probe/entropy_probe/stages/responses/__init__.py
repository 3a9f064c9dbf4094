"""Where the responses of a batch come from: sampled here, or read from a file.

prompts, tasks, gsm8k   what is asked
user_functions          datasets and rewards that are the user's own code
sampling, rewards       responses drawn from the policy, and what each is worth
rollouts                a batch of responses as tensors; JSON lines of them
sequences               the batch as `SequenceProcessor` gives it to users
"""
