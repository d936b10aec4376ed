"""Smaller and faster forms of a trained model, its accuracy guarded: pruning, quantisation, distillation.

channels     removes whole channels           sparsity    sets single weights to zero
quantise     int8, with and without training  distil      a small network learns from a large one
measure      accuracy, size, work, latency    search      tries all of it within a budget; what `marina compress` runs
"""
