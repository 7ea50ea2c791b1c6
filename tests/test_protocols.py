"""Protocols and prompts: who waits for whom, what is shown, which answer pays, and errors that name file and key."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import yaml

from ilr_fast.config import Config, PromptConfig, RewardConfig, RolloutConfig
from ilr_fast.errors import UserError
from ilr_fast.protocols import DialogueProtocol, View, load_protocol
from ilr_fast.protocols.templates import FOLDER, fill, load_prompts
from ilr_fast.types import Question

QUESTION = Question("q1", "What is {peers} + 7?", "19", solution="12 + 7 = 19")
SHORT = Config(prompts=PromptConfig(file="short"), reward=RewardConfig(name="number"))


def test_idea3_waits_and_pays():
    protocol = load_protocol("idea3", SHORT)
    assert protocol.stages == ("sharing", "analysis", "fusion")
    assert [protocol.needs(s) for s in protocol.stages] == [(), ("sharing",), ()]
    assert [protocol.reward_stage(s, "own") for s in protocol.stages] == ["sharing", "fusion", "fusion"]
    assert [protocol.reward_stage(s, "each") for s in protocol.stages] == list(protocol.stages)
    assert [protocol.reward_stage(s, "final") for s in protocol.stages] == ["fusion"] * 3
    shown = load_protocol("idea3", replace(SHORT, rollout=RolloutConfig(show_peer_analyses=True)))
    assert shown.needs("fusion") == ("analysis",)


def test_debate_waits_and_pays():
    protocol = load_protocol("debate", replace(SHORT, rollout=RolloutConfig(rounds=3)))
    assert protocol.stages == ("round_1", "round_2", "round_3")
    assert [protocol.needs(s) for s in protocol.stages] == [(), ("round_1",), ("round_2",)]
    assert [protocol.reward_stage(s, "own") for s in protocol.stages] == list(protocol.stages)
    assert {protocol.reward_stage(s, "final") for s in protocol.stages} == {"round_3"}
    view = View(QUESTION, own={"round_1": "> 1"}, peers=({"round_1": "> 2"}, {"round_1": "> 3"}))
    message = protocol.message("round_2", view)
    assert message == "Peer 1 said:\n> 2\nPeer 2 said:\n> 3\nWhat is {peers} + 7?"


def test_short_messages():
    protocol = load_protocol("idea3", SHORT)
    own, peer = {"sharing": "> 18", "analysis": "> 19"}, {"sharing": "> 20", "analysis": "> 21"}
    view = View(QUESTION, "neutral", own, (peer,))
    assert load_protocol("single", SHORT).message("single", view) == QUESTION.text
    assert protocol.message("sharing", view) == QUESTION.text
    assert protocol.message("sharing", replace(view, interaction="competition")) == f"To win: {QUESTION.text}"
    assert protocol.message("analysis", view) == f"Peer 1 said:\n> 20\n{QUESTION.text}"
    assert protocol.message("fusion", view) == QUESTION.text
    shown = load_protocol("idea3", replace(SHORT, rollout=RolloutConfig(show_peer_analyses=True)))
    assert shown.message("fusion", view) == f"Peer 1 said:\n> 21\n{QUESTION.text}"


@pytest.mark.parametrize("reward", ["math", "number", "choice", "code", "task", "my.module:Grader"])
@pytest.mark.parametrize("stage", ["sharing", "analysis", "fusion"])
def test_default_messages_differ_by_interaction(reward, stage):
    protocol = load_protocol("idea3", Config(reward=RewardConfig(name=reward)))
    view = View(QUESTION, "neutral", {"sharing": "> a", "analysis": "> b"}, ({"sharing": "> PEER"},))
    three = ("cooperation", "competition", "neutral")
    messages = {protocol.message(stage, replace(view, interaction=i)) for i in three}
    assert len(messages) == 3
    for message in messages:
        assert "\n\n\n" not in message and "{" not in message.replace("{peers}", "").replace("\\boxed{}", "")
        assert ("> PEER" in message) == (stage == "analysis")
        assert (r"\boxed{}" in message) == (reward in ("math", "choice") and stage != "analysis")


def test_neutral_sharing_is_the_single_prompt():
    for file in ("default", "short", "steps", "worked"):
        config = Config(prompts=PromptConfig(file=file))
        single, idea3 = load_protocol("single", config), load_protocol("idea3", config)
        assert single.message("single", View(QUESTION)) == idea3.message("sharing", View(QUESTION))


def test_worked_examples_and_ranking():
    user, answer = load_prompts("default", "math").worked([QUESTION])
    assert (user.role, answer.role) == ("user", "assistant") and user.content.startswith(QUESTION.text)
    assert answer.content == "12 + 7 = 19\n\nThe answer is \\boxed{19}."
    short = load_prompts("default", "math").worked([replace(QUESTION, solution=None)])
    assert short[1].content == "The answer is \\boxed{19}."
    assert load_prompts("short", "number").worked([QUESTION])[1].content == "19"
    assert load_prompts("steps", "number").worked([QUESTION])[1].content == "12 + 7 = 19"
    asked = load_prompts("default", "math").ranking([QUESTION, replace(QUESTION, text="1+1?")])
    assert "[1] What is {peers} + 7?\n[2] 1+1?" in asked and "2 numbers" in asked


def test_fill():
    assert fill("{a} {b}\n\n{a}\n\nc", a="", b="{a}") == "{a}\n\nc"
    assert fill(r"\boxed{} {{a}} {a}", a="1") == r"\boxed{} {a} 1"


class Tutor:
    name = "tutor"
    stages = ("draft", "advice")

    def __init__(self, config):
        self.prompts = load_prompts(config.prompts.file, config.reward.name)

    def needs(self, stage):
        return ("draft",) if stage == "advice" else ()

    def message(self, stage, view):
        return self.prompts.message("single", view)

    def reward_stage(self, stage, stage_reward):
        return "advice"


class NoProtocol:
    def __init__(self, config):
        pass


def test_a_users_own_protocol():
    here = Tutor.__module__
    sys.modules[here].Tutor = Tutor
    config = replace(SHORT, rollout=RolloutConfig(max_tokens={"default": 4, "advice": 3}))
    protocol = load_protocol(f"{here}:Tutor", config)
    assert isinstance(protocol, DialogueProtocol) and protocol.message("draft", View(QUESTION)) == QUESTION.text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("idea33", "did you mean 'idea3'"),
        ("no.such.module:Class", "can't import"),
        (f"{__name__}:Tutr", "did you mean 'Tutor'"),
        (f"{__name__}:NoProtocol", "needs name, stages"),
    ],
)
def test_protocol_errors(name, hint):
    with pytest.raises(UserError, match=hint):
        load_protocol(name, SHORT)


def test_an_unknown_stage_in_max_tokens():
    config = replace(SHORT, rollout=RolloutConfig(max_tokens={"default": 4, "fuson": 3}))
    with pytest.raises(UserError, match="rollout.max_tokens.fuson.*\n.*'fusion'"):
        load_protocol("single", config)


def broken(change) -> dict:
    texts = yaml.safe_load((FOLDER / "short.yaml").read_text())
    change(texts)
    return texts


@pytest.mark.parametrize(
    ("change", "where", "hint"),
    [
        (lambda t: t.update(fuson=t.pop("fusion")), "", "'fusion' is missing\n.*rename 'fuson'"),
        (lambda t: t.update(single="{qestion}"), ": single", "{qestion}\n.*'question'"),
        (lambda t: t.update(single="{peers}"), ": single", "unknown placeholder {peers}"),
        (lambda t: t["stance"]["fusion"].pop("neutral"), ": stance.fusion", "'neutral' is missing"),
        (lambda t: t["answer_form"].pop("default"), ": answer_form", "'default' is missing"),
        (lambda t: t.update(example={"default": "{answr}"}), ": example.default", "{answr}\n.*did you mean 'answer'"),
        (lambda t: t.update(peer=3), ": peer", "expected a text, got 3"),
        (lambda t: t.update(stance="no"), ": stance", "expected names with texts"),
    ],
)
def test_errors_in_a_users_file_name_file_and_key(tmp_path, change, where, hint):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(broken(change)))
    with pytest.raises(UserError, match=hint) as caught:
        load_prompts(str(path), "math")
    assert caught.value.where == f"{path}{where}"


def test_an_unknown_prompts_file():
    with pytest.raises(UserError, match="did you mean 'default'"):
        load_prompts("defalt", "math")


def test_a_users_file_may_hold_texts_of_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(broken(lambda t: t.update(tutor="Teach: {peers} {question}"))))
    prompts = load_prompts(str(path), "math")
    assert prompts.message("tutor", View(QUESTION), peers=["> x"]) == f"Teach: Peer 1 said:\n> x {QUESTION.text}"
    with pytest.raises(UserError, match="no text called 'tutr'"):
        prompts.message("tutr", View(QUESTION))
