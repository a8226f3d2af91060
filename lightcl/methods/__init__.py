"""Continual-learning methods, one file each, named as in the literature.

A new method is one new file here, or a plugin; no other file changes (lightcl/methods/base.py).
"""

from lightcl.methods.base import METHODS, Method, MethodParameters, StepCost, register

__all__ = ["METHODS", "Method", "MethodParameters", "StepCost", "register"]
