"""`python -m moelm.verify`: what moelm promises of a run, tried on the machine at hand.

`lab` starts real runs of `moelm.train`, `witnesses` are callbacks that disturb them and write down what they did, and
each other module has the checks of one subject.
"""
