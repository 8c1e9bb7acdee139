"""Every error that a user can cause, each naming the cause and the remedy.

The command line prints `OmniCompileError`s as one line and exits with code 2; anything else is a bug in OmniCompile.
"""


class OmniCompileError(Exception):
    """Base of all errors that a user can cause and mend."""


class InputError(OmniCompileError):
    """An argument, model file or configuration that cannot be used as given."""


class CaptureError(OmniCompileError):
    """The model's forward could not be traced."""


class PlanError(OmniCompileError):
    """No plan satisfies the request, or a given plan is inconsistent."""


class InfeasibleError(PlanError):
    """No plan fits into the memory of the cluster."""


class RecipeError(OmniCompileError):
    """A recipe file that cannot be read: malformed, an unknown key, or an unknown schema version."""


class LoweringError(OmniCompileError):
    """A plan that cannot be executed: an operator without a placement rule, a dimension that does not divide, ..."""


class VerificationError(OmniCompileError):
    """A rewritten program that does not equal the single-process one."""


class RankError(OmniCompileError):
    """Another rank has died, failed or left while this one waited for it."""


class CheckpointError(OmniCompileError):
    """A checkpoint that could not be written, is damaged, or does not fit the model or its optimizer."""
