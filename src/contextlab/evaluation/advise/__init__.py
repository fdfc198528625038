"""What is the best way to spend some memory on a model, so many sequences of a length, and their context?"""

from contextlab.evaluation.advise.answer import Advice, advise
from contextlab.evaluation.advise.foretell import Form, Way, foretell

__all__ = ["Advice", "Form", "Way", "advise", "foretell"]
