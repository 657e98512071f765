"""How fast, against whom, and how far from the machine's limits: what ``idm-fast bench`` and ``idm-fast profile`` run.

timing.py     candidates take turns; medians with p20 and p80
roofline.py   the machine's limits, measured; T_roof of an operation or of a whole network
work.py       the layers of a network with their FLOPs and bytes
workload.py   what is timed: a network, its weights, a batch, a walk of steps, the noise
launches.py   kernels or operators of one evaluation
plain.py      the same network as plain torch modules, for others to compile and export
peers/        one file a competitor
ours.py       idm_fast itself, with and without its engine
rows.py       workload + candidates -> rows of the results file
text.py       rows as tables
machine.py    what the figures depend on
profile.py    one step taken apart, call by call; profile_files.py writes what it found
plot.py       line, bar and roofline pictures, drawn with Pillow
"""
