"""A checkpoint's folder, read again by the libraries alone: no reader, no forward and no step of ours.

What is found goes into the evidence, where criteria compare it with what the measurement used.

stored  the optimizer's file and the weights, tensor by tensor
inputs  the prompts, their gold answers and the rewards, looked up in the files that they are from
plain   the model of transformers and peft, scored one response at a time without padding
"""
