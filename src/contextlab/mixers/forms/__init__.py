"""Linear forms: how the weights of a linear layer are stored. One file a kin; each registers itself."""

from contextlab.mixers.forms.base import LinearForm, RoundedForm, build_form

__all__ = ["LinearForm", "RoundedForm", "build_form"]
