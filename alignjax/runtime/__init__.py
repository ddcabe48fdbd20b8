"""What keeps a run alive and visible: checkpoints, files, processes, signals and logs. It knows no
algorithm."""
