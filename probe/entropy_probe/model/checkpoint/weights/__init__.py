"""The model and its tokenizer.

pretrained  full models;   adapter  PEFT adapters over a base model on disk;   build  either of them
tokenizer
"""
