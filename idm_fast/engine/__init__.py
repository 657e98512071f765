"""The engine: a network as a static plan of fused operations on packed weights, run without a decision in the loop.

nodes.py      what a plan is made of                  lower.py       network and shape -> nodes
weights.py    parameters as the operations take them  tables.py      what changes from step to step
buffers.py    where values lie, who shares memory     memory.py      how much there is
autotune.py   back ends by measurement                bind.py        node -> call without arguments
plan.py       all calls, on their buffers             precision.py   devices, number formats, their limits
loop.py       a walk call by call                     graph.py       a walk as CUDA graphs (graph_pool.py, runtime.py)
surroundings.py  what callers set for torch code of their own     lossy.py  8-bit tiers, reuse
writer.py     what nodes are written with             lower_vqgan.py  the same for a VQGAN
engine.py     ``Engine``: compile, run, memory        autoencoder.py ``AutoencoderEngine``: encode, decode
checks.py     what all ask of those who use them  latent.py      ``LatentEngine``: encoder, walk, decoder as one
"""

from idm_fast.engine.autoencoder import AutoencoderEngine
from idm_fast.engine.engine import Engine, EngineOptions, Memory

__all__ = ["AutoencoderEngine", "Engine", "EngineOptions", "Memory"]
