"""Continual-learning methods, one file each, named as the literature names them."""

from lightcl.methods.base import Method, MethodParameters
from lightcl.methods.derpp import DERppParameters
from lightcl.methods.er import ERParameters
from lightcl.methods.ewc import EWCParameters
from lightcl.methods.fdr import FDRParameters
from lightcl.methods.joint import JointParameters
from lightcl.methods.lightcl import LightCLParameters
from lightcl.methods.lightcl_plus import LightCLPlusParameters
from lightcl.methods.lightcl_sparse import LightCLSparseParameters
from lightcl.methods.pnn import PNNParameters
from lightcl.methods.sgd import SGDParameters
from lightcl.methods.sparcl import SparCLDERppParameters, SparCLERParameters

AnyMethod = (
    JointParameters
    | SGDParameters
    | EWCParameters
    | PNNParameters
    | FDRParameters
    | ERParameters
    | DERppParameters
    | SparCLERParameters
    | SparCLDERppParameters
    | LightCLParameters
    | LightCLSparseParameters
    | LightCLPlusParameters
)
"""In the order of the paper's Table 1, then ours."""

__all__ = [
    "AnyMethod",
    "DERppParameters",
    "ERParameters",
    "EWCParameters",
    "FDRParameters",
    "JointParameters",
    "LightCLParameters",
    "LightCLPlusParameters",
    "LightCLSparseParameters",
    "Method",
    "MethodParameters",
    "PNNParameters",
    "SGDParameters",
    "SparCLDERppParameters",
    "SparCLERParameters",
]
