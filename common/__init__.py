"""What every room uses: one-line errors, files that a kill never spoils, checkpoints, run folders,
randomness by step, the cache, published models, processes. Nothing here is about pruning, and no
other room is imported.
"""
