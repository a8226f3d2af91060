"""Continual-learning methods, one file each, named as the literature names them."""

from lightcl.methods.base import Method, MethodParameters
from lightcl.methods.joint import JointParameters
from lightcl.methods.lightcl import LightCLParameters
from lightcl.methods.lightcl_plus import LightCLPlusParameters
from lightcl.methods.lightcl_sparse import LightCLSparseParameters
from lightcl.methods.sgd import SGDParameters

AnyMethod = LightCLParameters | LightCLSparseParameters | LightCLPlusParameters | SGDParameters | JointParameters

__all__ = [
    "AnyMethod",
    "JointParameters",
    "LightCLParameters",
    "LightCLPlusParameters",
    "LightCLSparseParameters",
    "Method",
    "MethodParameters",
    "SGDParameters",
]
