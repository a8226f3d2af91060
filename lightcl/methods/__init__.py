"""Continual-learning methods, one file each, named as in the literature.

A new method is a new file here, or a plugin: nothing else has to be edited (lightcl/methods/base.py).
"""

from lightcl.methods.base import METHODS, Method, MethodParameters, StepCost, register

__all__ = ["METHODS", "Method", "MethodParameters", "StepCost", "register"]
