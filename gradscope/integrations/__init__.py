"""The online mode inside other people's training loops: one file per framework, none imported before it is asked for.

`gradscope.integrations.lightning`, `.transformers` and `.timm`; `attach` serves any loop that steps an optimizer.
"""

from gradscope.integrations.common import attach, set_strategy

__all__ = ["attach", "set_strategy"]
