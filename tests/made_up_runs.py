"""Run folders with invented but plausible content, for the tests of report and show."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import yaml

from ilr_fast.statistics import accuracy_interval

STAGES = ("sharing", "analysis", "fusion")
TALK = """so the largest digit of both numbers is compared first because place value decides and if they agree we go on
to the next one therefore let us check again carefully whether my peer has overlooked a carry in the tens column which
would change the sum by ten I now think that the second answer is right since it follows from the definition step"""
HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text'"


def make_run(folder: Path, *, agents=("smollm2", "gemma"), steps=14, planned=None, seed=0, questions=300, lift=0.4,
             method="ilr", stages=STAGES, evaluated=True, hostile=False, dialogues=8, words=0,
             benchmarks=("test",), modes=("single",)) -> Path:
    """Writes every file of a run folder that a report reads; `words`: how long agents speak; `dialogues`: in a step."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    config = {"run": str(folder), "seed": seed, "steps": planned or steps, "interaction": "dynamic",
              "protocol": "single" if method == "grpo" else "idea3", "method_of_this_test": method,
              "agents": {name: {"model": f"models/{name}", "optimizer": {"lr": 2e-5}} for name in agents},
              "data": {"train": "task:largest"}, "rollout": {"questions": 8, "samples": 8}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({
        "device": "CPU AMD EPYC 7B13, 2 cores", "driver": None, "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "commit": "4108d4e", "command": "ilr-fast train configs/cpu/quickstart.yaml"}))  # fmt: skip
    skill = {name: 0.30 + 0.06 * i for i, name in enumerate(agents)}
    rows = [_metrics(step, steps, skill, lift, stages, draw) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dialogues").mkdir()
    for step in range(1, steps + 1):
        lines = [_dialogue(step, q, sample, skill, lift * step / steps, stages, draw, hostile, words)
                 for q in range(dialogues // 2) for sample in range(2)]
        (folder / "dialogues" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if steps:
        _write_interaction(folder, agents, steps, draw)
        (folder / "failures.jsonl").write_text(json.dumps({
            "step": min(3, steps), "kind": "dialogue", "question": "largest-17", "sample": 2, "agent": None,
            "error": HOSTILE if hostile else "gemma, fusion: a prompt of 214 tokens leaves no room",
        }) + "\n")  # fmt: skip
    if evaluated:
        _write_results(folder, skill, lift, method, questions, seed, benchmarks, modes)
    return folder


def _metrics(step, steps, skill, lift, stages, draw):
    grown = 1 - math.exp(-3 * step / max(steps, 1))

    def agent(name):
        right = skill[name] + lift * grown
        accuracy = {s: min(1.0, max(0.0, right + 0.04 * i + draw.gauss(0, 0.04))) for i, s in enumerate(stages)}
        reward = sum(accuracy.values()) / len(accuracy) + 0.09
        return {
            "accuracy": accuracy, "reward": reward, "calibrated_reward": reward + draw.gauss(0.05, 0.05), "groups": 24,
            "groups_dropped": draw.randrange(2, 9), "cooperation_share": 0.62 - 0.2 * grown + draw.gauss(0, 0.03),
            "loss": draw.gauss(0, 0.01), "entropy": 1.4 - 0.7 * grown + draw.gauss(0, 0.05), "kl_reference": None,
            "logp_diff_mean": 2e-6 * (1 + draw.random()), "logp_diff_max": 3e-5 * (1 + draw.random()),
            "clip_share": 0.0, "grad_norm": 1.2 + draw.random(), "lr": 2e-5, "memory_peak_gib": 5.1 + 0.02 * step,
            "tokens_per_second": 410 + draw.gauss(0, 20),
            "prefix_hit_rate": 0.75, "truncated_share": 0.02 * grown,
            "validation_accuracy": right if step % 7 == 0 else None,
        }  # fmt: skip

    seconds = {"generate": 14 + draw.random() * 3, "reward": 0.4, "train": 11 + draw.random() * 2, "sync": 0.05,
               "swap": None, "checkpoint": 6.0 if step % 7 == 0 else 0.0, "evaluate": 4.0 if step % 7 == 0 else 0.0,
               "other": 0.2}  # fmt: skip
    seconds["total"] = sum(v or 0 for v in seconds.values())
    return {"step": step, "seconds": seconds, "failures": 0,
            "tokens": {"prompt": 9000, "generated": 3100, "trained": 2500, "dropped": 600},
            "agents": {name: agent(name) for name in skill}}  # fmt: skip


def _dialogue(step, q, sample, skill, lift, stages, draw, hostile, words):
    numbers = [draw.randrange(10, 999) for _ in range(3)]
    expected = str(max(numbers))

    def turn(name, i, stage):
        right = draw.random() < skill[name] + lift + 0.1 * i
        said = expected if right else str(draw.choice(numbers))
        right = said == expected
        message = f"Question: Which number is the largest: {numbers}?" if i == 0 else f"Peer 1 said:\n> {expected}"
        thought, told = (" ".join(draw.choices(TALK.split(), k=words)) for _ in range(2))
        reward = right + 0.1 * (draw.random() < 0.8)
        return {"stage": stage, "interaction": stances[i, name], "message": f"{message} {told}",
                "text": HOSTILE if hostile else f"{thought} {said}", "finish": draw.choice(["stop", "length"]),
                "tokens": 4 + words, "answer": said, "correct": right, "formatted": True, "grade": reward,
                "grade_error": None, "reward": reward, "calibrated": reward + draw.gauss(0.1 * reward, 0.15),
                "advantage": draw.gauss(0, 1), "error": None, "prompt_ids": [7] * (2 * words + 1),
                "token_ids": [12345] * (words + 1), "logps": [-0.123456] * (words + 1)}  # fmt: skip

    stances = {(i, name): draw.choice(["cooperation", "competition"]) for i in range(len(stages)) for name in skill}

    text = HOSTILE if hostile else f"Which number is the largest: {', '.join(map(str, numbers))}?"
    return {"question": f"largest-{step * 4 + q}", "text": text, "answer": expected, "sample": sample,
            "protocol": "idea3", "error": None,
            "agents": {n: [turn(n, i, s) for i, s in enumerate(stages)] for n in skill}}  # fmt: skip


def _write_interaction(folder, agents, steps, draw):
    ids = [f"largest-{i}" for i in range(4, steps * 4 + 4)]
    (folder / "interaction.json").write_text(json.dumps({
        "abilities": [{"step": 0, "ability": {name: draw.gauss(-0.4, 0.2) for name in agents}}],
        "difficulty": {name: {q: draw.gauss(0, 1) for q in ids} for name in agents},
        "unknown_questions": {name: 2 for name in agents}, "windows": {name: 60 for name in agents},
        "invalid_windows": {name: 3 for name in agents}}))  # fmt: skip


def _write_results(folder, skill, lift, method, questions, seed, benchmarks, modes):
    rows = []
    (folder / "evaluations").mkdir()
    draw = random.Random("luck")  # how hard a question is does not depend on the run's seed
    luck = {(name, b, q): draw.random() for name in skill for b in benchmarks for q in range(questions)}
    draw = random.Random(f"results {seed} {method}")
    for label, examples, gain in (("base", None, 0.0), ("base_few_shot", 4, 0.12), ("base_few_shot", 8, 0.1),
                                  (method, None, lift)):  # fmt: skip
        for benchmark, mode in [(b, m) for b in benchmarks for m in modes]:
            file = f"evaluations/{label}{f'_{examples}' if examples else ''}_{benchmark}_{mode}.jsonl"
            lines = []
            for place, name in enumerate(skill):
                bar = skill[name] + gain + {"single": 0.0, "debate": 0.0, "idea3": 0.12 * (-1) ** place}[mode]
                correct = [0.8 * luck[name, benchmark, q] + 0.2 * draw.random() < bar for q in range(questions)]
                lines += [{"agent": name, "question": f"{benchmark}-{q}", "correct": [c]}
                          for q, c in enumerate(correct)]
                rows.append({
                    "agent": name, "method": label, "benchmark": benchmark, "mode": mode, "n": questions,
                    "correct": sum(correct), "accuracy": sum(correct) / questions, "samples": 1, "seed": seed,
                    "ci95": accuracy_interval([[c] for c in correct]), "checkpoint": None,
                    "tokens_mean": 4.2 + draw.random(), "examples": examples, "outcomes": file})  # fmt: skip
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps(rows))
