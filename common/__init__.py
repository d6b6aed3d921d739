"""What every room stands on: one-line errors, files that a kill never spoils, run folders,
randomness by step, the cache, published models, processes. Knows nothing of pruning and imports no
other room.
"""
