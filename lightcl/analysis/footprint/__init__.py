"""FLOPs and memory of training: counted (theory.py), as the paper counts them (paper.py), measured (measured.py)."""

from lightcl.analysis.footprint.theory import CATEGORIES, Category, Footprint, Workload, footprint, workload_of

__all__ = ["CATEGORIES", "Category", "Footprint", "Workload", "footprint", "workload_of"]
