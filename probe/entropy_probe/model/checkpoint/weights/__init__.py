"""The model and its tokenizer: full models, PEFT adapters over a base model on disk."""
