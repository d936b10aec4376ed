"""The optimisation ladder: forms of one network that may be faster on this machine, each built, measured and judged.

`ladder.run` climbs it; `rungs.build` makes one rung. What passes becomes `engine.json` and `engine/` of a new artifact
version (the format is `handlerlib.engine_spec`, the reader `handlerlib.engines`). Modules are imported by name.
"""
