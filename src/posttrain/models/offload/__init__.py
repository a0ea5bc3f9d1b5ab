"""What a run need not have in the device's memory all the time (`train.offload`): a frozen base's layers, or activations."""
