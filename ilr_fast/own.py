"""What users bring themselves, named in the config as `module:Name`: a task, a grader, a protocol.

    grader_class = load_own("myrewards:ShortAndRight", "reward.name")
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ilr_fast.errors import UserError, nearest


def load_own(path: str, where: str) -> Any:
    """The object `module:Name`; modules in the folder that the command was started from are found too.

    Raises UserError, naming `where`, for a module that can't be imported, whatever is wrong with it, or lacks the name.
    """
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not have the working folder on its path
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code, whatever it raises
        remedy = "give module:Name, the module's file in this folder or installed, and free of errors"
        raise UserError(f"can't import {module_name!r} ({type(error).__name__}: {error})", where, remedy) from error
    if not hasattr(module, attribute):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"{module_name!r} has no {attribute!r}", where, nearest(attribute, own or ["(nothing)"]))
    return getattr(module, attribute)
