"""What a training run says of its own settings: read, and never run.

settings   the files in which trainers leave them, and what they say of the next update
trl        `training_args.bin` of TRL and Unsloth
others     YAML and JSON of verl, NeMo RL and prime-rl
pickled    a pickle followed without importing or calling anything
resolved   the recipe of a run: what was asked for, over what was found
"""
