"""The engine: a network as a static plan of fused operations on packed weights, run without a decision in the loop.

nodes.py    what a plan is made of                 lower.py      network and shape -> nodes
weights.py  parameters as the operations take them tables.py     what changes from step to step
bind.py     node -> prepared call                  plan.py       all of them, on their buffers
precision.py  number formats                       engine.py     ``Engine``: compile, run, memory
"""

from idm_fast.engine.engine import Engine, EngineOptions, Memory

__all__ = ["Engine", "EngineOptions", "Memory"]
