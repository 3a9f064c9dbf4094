"""What other programs are told of a report. Nothing else of the library imports this.

figures   the numbers of a report under the names that trackers show
trackers  where they are logged: TensorBoard, W&B, trackio, JSON lines
"""
