"""Side floor, which knows no word of RL: devices, checkpoints, run folders, metrics and plots."""
