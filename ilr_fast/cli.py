"""The command line: `ilr-fast COMMAND …`. Exit status 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted.

    ilr-fast train configs/cpu/quickstart.yaml
    ilr-fast show runs/quickstart --step 3
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ilr_fast import __version__
from ilr_fast.durable import check_writable
from ilr_fast.errors import RunError, UserError, nearest

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; a traceback only with `--debug`."""
    _quiet_libraries()
    options = _parse(arguments)
    try:
        options.command(options)
        return 0
    except UserError as error:
        return _fail(error, options.debug, 2)
    except KeyboardInterrupt:
        print("interrupted; what was done is saved, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ilr-fast show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RunError as error:
        return _fail(error, options.debug, 1)
    except Exception as error:
        return _fail(error, options.debug, 1)


def _quiet_libraries() -> None:
    """Our own display says what is being done; set TRANSFORMERS_VERBOSITY to hear the libraries too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns of every verifier process
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; key=value may stand after an option too, which argparse alone does not understand."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _fail(error: Exception, debug: bool, status: int) -> int:
    if debug:
        raise error
    ours = isinstance(error, (UserError, RunError))
    text = str(error) if ours else f"{type(error).__name__}: {error}\n  → --debug shows where"
    print(f"ilr-fast: {text}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """argparse, with our form of errors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Says what is wrong in our form, for an unknown command the nearest one too; SystemExit(2)."""
        if "invalid choice" in message and "choose from" in message and self.prog == "ilr-fast":
            word = message.split("'")[1]
            message = f"unknown command {word!r}; {nearest(word, COMMANDS)}"
        message = message.replace(", key=value", "")  # none need be given
        print(f"ilr-fast: {message}\n  → {self.prog} --help lists what can be given", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ilr-fast", description="Language models that learn by talking to one another.")
    parser.add_argument("--version", action="version", version=f"ilr-fast {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, (add, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text.replace("%", "%%"), description=text)  # argparse formats helps
        add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file (configs/ has some)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ from the file")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--fresh", action="store_true", help="refuse an existing run folder instead of going on in it")
    parser.add_argument("--merge", action="store_true", help="write adapters as full models too, in RUN/merged")


def _train(options: argparse.Namespace) -> None:
    from ilr_fast.config_parse import load_config
    from ilr_fast.merge import check_merge, merge_adapters
    from ilr_fast.report import report
    from ilr_fast.train import train

    config = load_config(options.config, options.overrides)
    if options.merge:
        check_merge(config)
    run = train(config, fresh=options.fresh, command=_command_line())
    report([run])
    for folder in merge_adapters(run) if options.merge else ():
        print(f"merged: {folder}")
    print(f"next: ilr-fast show {run}        (what the agents said to one another)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--gpu-memory", default=None, metavar="SIZE",
                        help="for cards of this size, 24GiB for example; default: the cards of this machine")


def _plan(options: argparse.Namespace) -> None:
    from ilr_fast.plan_command import plan_command

    plan_command(options.config, options.overrides, options.gpu_memory)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="RUN or MODEL", help="run folders or models")
    parser.add_argument("--benchmarks", required=True, help="names, JSONL files or Hub names, separated by commas")
    parser.add_argument("--mode", default="single", help="single, debate, idea3; several by commas")
    parser.add_argument("--samples", type=int, default=1, help="answers for each question; 1 is greedy")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--out", default=None, help="folder of results.json; default: the run's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="config keys, as for train")


def _eval(options: argparse.Namespace) -> None:
    from ilr_fast.evaluate_command import evaluate_command

    evaluate_command(
        options.targets,
        benchmarks=_list(options.benchmarks),
        modes=_list(options.mode),
        samples=options.samples,
        limit=options.limit,
        out=_place(options.out, "--out"),
        overrides=options.set,
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; seeds of one config are one curve")
    parser.add_argument("--out", default=None, metavar="FILE", help="the page; default: report.html in the first run")
    parser.add_argument("--figures", default=None, metavar="DIR", help="every figure as PDF and CSV into this folder")


def _report(options: argparse.Namespace) -> None:
    from ilr_fast.report import report

    out, figures = _place(options.out, "--out"), _place(options.figures, "--figures")
    report([Path(run) for run in options.runs], out=out, figures=figures)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, default=None, help="the step; default: the newest")
    parser.add_argument("--question", default=None, metavar="ID", help="only this question's dialogues")


def _show(options: argparse.Namespace) -> None:
    from ilr_fast.show import show

    show(Path(options.run), step=options.step, question=options.question)


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--methods", default=None, help="which, by commas: ilr, ilr_di, ilr_pc, ilr_neither, "
                        "ilr_ratio_R, grpo, grpo_peer, grpo_third; default: all but ilr_neither and grpo_third, "
                        "R = 0, 0.25, 0.5, 0.75, 1")
    parser.add_argument("--seeds", default=None, help="a run of each for every one of these seeds, by commas")
    parser.add_argument("--jobs", type=int, default=1, help="so many runs at a time, each in a process (default 1)")


def _ablate(options: argparse.Namespace) -> None:
    from ilr_fast.ablate import METHODS, ablate
    from ilr_fast.config_parse import load_config
    from ilr_fast.train import train

    methods = METHODS if options.methods is None else _list(options.methods)
    seeds = [] if options.seeds is None else [_whole(seed, "--seeds") for seed in _list(options.seeds)]
    config = load_config(options.config, options.overrides)
    jobs = _whole(str(options.jobs), "--jobs", least=1)
    ablate(config, train, methods=methods, seeds=seeds, jobs=jobs, command=_command_line())


def _add_difficulty(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--questions", type=int, default=100, help="the first so many training questions (default 100)")
    parser.add_argument("--samples", type=int, default=8, help="answers to each, for pass rates (default 8)")
    parser.add_argument("--out", default=None, metavar="FILE", help="JSON of what was measured")


def _difficulty(options: argparse.Namespace) -> None:
    from ilr_fast.config_parse import load_config
    from ilr_fast.difficulty_study import difficulty_study

    questions = _whole(str(options.questions), "--questions", least=2)
    samples = _whole(str(options.samples), "--samples", least=1)
    difficulty_study(load_config(options.config, options.overrides), questions=questions, samples=samples,
                     out=_place(options.out, "--out"), command=_command_line())


def _add_get_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="smollm2-135m-instruct or gemma-3-270m")
    parser.add_argument("folder", metavar="DIR", nargs="?", default=None, help="where to; default: the user's cache")


def _get_model(options: argparse.Namespace) -> None:
    from ilr_fast.models import get_model

    print(get_model(options.name, Path(options.folder) if options.folder else None))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="which benchmarks; default: all that fit this machine; `figures` redraws from the JSON")
    parser.add_argument("--rounds", type=int, default=7, help="how often each variant is timed (default 7)")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder of the JSON; default: benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--only-ours", action="store_true", help="leave out plain PyTorch and other libraries")
    parser.add_argument("--no-figures", action="store_true", help="the JSON alone; `bench figures` draws them later")
    parser.add_argument("--commit", default=None, help="what to write as the commit, where git does not know this tree")


def _bench(options: argparse.Namespace) -> None:
    from ilr_benchmarks.bench import bench

    bench(options.names, rounds=options.rounds, out=_place(options.out, "--out"), quick=options.quick,
          only_ours=options.only_ours, command=_command_line(), commit=options.commit, draw=not options.no_figures)


def _whole(text: str, option: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{text!r} is no whole number of at least {least}", option, "give such a number")
    return int(text)


def _place(text: str | None, option: str) -> Path | None:
    """Where an option wants its output; UserError where that can't be written."""
    if text is None:
        return None
    check_writable(Path(text), option)
    return Path(text)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _command_line() -> str:
    """The command as the user typed it, without the path of the script."""
    return shlex.join(["ilr-fast", *sys.argv[1:]])


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Command, str]] = {
    "train": (_add_train, _train, "train the agents of a config; goes on where its run stopped"),
    "plan": (_add_plan, _plan, "the memory of each agent and phase, and what would make it fit; loads nothing"),
    "eval": (_add_eval, _eval, "accuracy of runs or models on benchmarks, with 95% intervals"),
    "report": (_add_report, _report, "write report.html for one run or several"),
    "show": (_add_show, _show, "read a run's dialogues"),
    "ablate": (_add_ablate, _ablate, "base, GRPO, ILR and its parts from one config"),
    "difficulty": (_add_difficulty, _difficulty, "self-ranked difficulty against levels, pass rates and chance"),
    "bench": (_add_bench, _bench, "the benchmarks, kernels to whole steps: errors first, then times beside the limit"),
    "get-model": (_add_get_model, _get_model, "a small real model as a Hugging Face folder"),
}


if __name__ == "__main__":
    sys.exit(main())
