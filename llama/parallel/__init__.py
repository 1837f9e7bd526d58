"""Ranks: rendezvous, process groups, exchanges of objects, devices, and the heartbeat that notices a lost rank.

Imports no other module of the package. Read `groups.py` first. `heartbeat.py` ends all ranks soon after one is lost.
"""
