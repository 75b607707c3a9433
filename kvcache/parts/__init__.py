"""The parts of the memory, each pure and tested alone; they know no Context.

Blocks, sequences, the prefix index, K/V and states hold what a Context holds and never
import each other; state rows, windows, and the loops that publish and release work over
several of them. Below them stands what they all use: flat lists, hashes, the eviction
ring, compiled loops, and the reading of arguments.
"""
