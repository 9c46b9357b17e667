"""Which form of an op runs if none is requested: chosen by tests on the machine itself, and cached.

`policy` runs each call of an operator by the verdict of its class (`call_class`); `tables` holds the verdicts of this
process, `store` those on disk; `proof` finds them, testing `candidates` on small calls from `samples`.
"""
