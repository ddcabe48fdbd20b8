"""What keeps a run alive and visible: checkpoints, files, processes, signals, logs. Knows no
algorithm."""
