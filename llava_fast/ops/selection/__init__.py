"""Which form of an op runs where nobody asked for one: found by proof on the machine itself, and kept.

`policy` lets each call of an operator go by the verdict of its class (`call_class`); `tables` holds the verdicts of
this process, `store` those of the user; `proof` finds them, with small calls from `samples` and `candidates` to try.
"""
