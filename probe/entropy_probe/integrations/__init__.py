"""The probe inside of other people's loops, and what other programs are told of a report. Each module is imported by
the user alone, and imports what it is for.

transformers  a callback for Trainer, GRPOTrainer and RLOOTrainer
as_found      whatever happens inside, random numbers go on as if it had not
of_trainer    prompts, tokenizer and sampling as a trainer has them
figures       the numbers of a report under the names that trackers show
trackers      where they are logged: TensorBoard, W&B, trackio, JSON lines
"""
