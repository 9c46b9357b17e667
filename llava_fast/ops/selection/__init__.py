"""Autotuning: which backend of an op runs if none is requested, decided by tests on this machine and cached.

`policy` runs each operator call by the verdict of its class (`call_class`). `tables` holds the verdicts of this
process, `store` those on disk. `proof` finds verdicts by testing `candidates` on small calls from `samples`.
"""
