"""Frozen models that give targets, behind one protocol."""
