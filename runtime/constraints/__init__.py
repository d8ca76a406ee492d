"""Structured output: which tokens may come next, so that the text is what a request's constraint asks for."""

from pressd.runtime.constraints.compiler import ConstraintCompiler as ConstraintCompiler
from pressd.runtime.constraints.error import ConstraintError as ConstraintError
from pressd.runtime.constraints.matcher import Grammar as Grammar
from pressd.runtime.constraints.matcher import Matcher as Matcher

__all__ = ["ConstraintCompiler", "ConstraintError", "Grammar", "Matcher"]
