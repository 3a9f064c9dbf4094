"""Where the responses of a batch come from: sampled here, or read from a file.

prompts, tasks, gsm8k   what is asked
prompt_files            prompts in the files of trainers, a row at a time
ids                     how text becomes token ids, at every door
user_functions          datasets and rewards that are the user's own code
sources                 the files such a reward is made of, by digest
rewards                 what a response is worth
rollouts                a batch of responses as tensors
rollouts_file           rollouts read from JSON lines
trainers_rollouts       rollouts that trainers wrote, as such lines
sampled_rollouts        rollouts drawn from the policy
sampling, drawing       responses from the policy, and one token of each
steps                   logits of the next token, over the model's cache or from whole rows
texts                   the texts of a batch, for the eye
sequences               the batch as `SequenceProcessor` gives it to users
"""
