"""Protocols: who speaks when and sees what. One file each; a user names their own by `module:Class`.

    protocol = load_protocol("idea3", config)
"""

from __future__ import annotations

from typing import Any

from ilr_fast.config import Config
from ilr_fast.errors import UserError, nearest
from ilr_fast.own import load_own
from ilr_fast.protocols.base import DialogueProtocol, View
from ilr_fast.protocols.debate import Debate
from ilr_fast.protocols.idea3 import Idea3
from ilr_fast.protocols.single import Single

__all__ = ["DialogueProtocol", "View", "load_protocol"]

PROTOCOLS: dict[str, type] = {"single": Single, "debate": Debate, "idea3": Idea3}


def load_protocol(name: str, config: Config) -> DialogueProtocol:
    """The protocol of that name, or the user's own `module:Class`, which is called with the config. Raises UserError.

    The stages that `rollout.max_tokens` names are checked against those of the protocol and of the built-in ones.
    """
    if name not in PROTOCOLS and ":" not in name:
        remedy = f"{nearest(name, PROTOCOLS)}; or module:Class"
        raise UserError(f"there is no protocol called {name!r}", "protocol", remedy)
    made: Any = PROTOCOLS[name] if name in PROTOCOLS else load_own(name, f"protocol = {name}")
    protocol = made(config)
    if not isinstance(protocol, DialogueProtocol) or not protocol.stages:
        raise UserError(f"{name!r} is no protocol", "protocol",
                        "it needs name, stages, needs(), message() and reward_stage() (docs/extending.md)")
    known = {"default", *protocol.stages, *Single.stages, *Idea3.stages, *Debate(config).stages}
    for stage in config.rollout.max_tokens:
        if stage not in known:
            raise UserError(f"no stage is called {stage!r}", f"rollout.max_tokens.{stage}", nearest(stage, known))
    return protocol
