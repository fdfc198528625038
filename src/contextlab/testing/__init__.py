"""The laws of contextlab's contracts, for anyone's mixer, MLP, model, task, learner, policy, conversion.

In a shell, `contextlab check mixer my_mixer --plugin my.py` holds a component to every law of its kind. In pytest:

```python
import my_plugin  # registers "my_mixer"
from contextlab.testing import parametrize_with_laws

@parametrize_with_laws("mixer", "my_mixer")
def test_my_mixer_keeps_the_laws(law):
    law()  # one test a law and option case; it fails with the smallest case that breaks the law
```

Needs the packages of `pip install 'contextlab[testing]'`: hypothesis, which searches for cases, and pytest.
"""

from __future__ import annotations

from contextlab.errors import ResourceError

try:
    import hypothesis  # noqa: F401
except ImportError:
    raise ResourceError("contextlab.testing needs hypothesis: pip install 'contextlab[testing]'") from None

from contextlab.testing.harness import Held, check, components, laws, parametrize_with_laws
from contextlab.testing.law import Component, Law, LawBroken, law

__all__ = ["Component", "Held", "Law", "LawBroken", "check", "components", "law", "laws", "parametrize_with_laws"]
