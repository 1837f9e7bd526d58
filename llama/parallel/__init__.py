"""Ranks: rendezvous, process groups, exchanges of objects, devices, and the heartbeat that notices a lost rank.

Imports errors and interrupt only. Read `groups.py` first; `heartbeat.py` ends all ranks soon after one is lost.
"""
