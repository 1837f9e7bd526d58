"""Ranks: rendezvous, process groups, devices, exchanges of objects, heartbeats that notice a lost rank.

Imports errors and interrupt only. `groups.py` is part of the core, the rest makes ranks fail together and soon.
"""
