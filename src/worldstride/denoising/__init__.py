"""Which evaluations are made?"""

from worldstride.denoising.loop import DenoisePlan, Denoising, Evaluation, denoise
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.denoising.solvers import make_solver

__all__ = ["DenoisePlan", "Denoising", "Evaluation", "denoise", "make_solver", "shifted_sigmas"]
