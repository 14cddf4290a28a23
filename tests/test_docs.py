"""README and docs/: commands parse, links and figures resolve, Python runs."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import POINTMAZE, TINY, run_main

from agents import AGENTS
from envs.tasks import parse_task
from experiments.sweep import command as sweep
from utils.output.loggers import read_csv
from utils.run.agent_config import resolve_agent
from utils.run.foreign_flags import REPLACED
from utils.system.files import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^\1```$")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# A file that a reader writes, and one that can stand in for it.
YOURS = "my_agents/mine.py", "agents/bc.py"
# Script → the module that parses its flags.
SCRIPTS = {"examples/own_task.py": "main", "tests/spot_env.py": "spot_env"}


def blocks(page: Path, language: str) -> list[str]:
    """Returns the fenced code blocks of one language."""
    return [body for _, name, body in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    """Returns a page without its fenced code."""
    return FENCE.sub("", page.read_text())


def commands(page: Path) -> list[str]:
    """Returns all commands `python …` and `make …` of a page, fenced and inline."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in lines:
        words = re.sub(r"^((\w+=\S+ )*)(\.venv/bin/)?", "", line.strip())
        if words.startswith(("python ", "make ")) and not words.startswith("python -c"):
            found.append(words)
    return found


class Parsed(Exception):
    """Raised in place of what a program does after its command line is parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Returns a function that has a command line parsed by its program, which does not run."""

    def stop(function):
        def parse_and_stop(*args, **kwargs):
            result = function(*args, **kwargs)
            if hasattr(result, "overrides"):  # A config: its agent and settings exist, too.
                resolve_agent(result, parse_task(result.env_name))
            raise Parsed

        return parse_and_stop

    def run(module: ModuleType, argv: list[str]) -> None:
        for name in getattr(module, "FLAGS", ()):
            module.FLAGS[name].unparse()
        with monkeypatch.context() as patch:
            for name in ("parse", "parse_arguments", "parse_flags"):
                if hasattr(module, name):
                    patch.setattr(module, name, stop(getattr(module, name)))
            patch.setattr(argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args))
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(Parsed):
                module.main(argv)

    return run


def find_module(name: str) -> str:
    """Returns the module that has the `main` of `python -m <name>`."""
    return f"{name}.command" if (ROOT / name.replace(".", "/") / "command.py").exists() else name


@each_page
def test_commands_parse(page, parse, monkeypatch):
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    monkeypatch.syspath_prepend(ROOT / "tests")
    for line in commands(page):
        program, *words = shlex.split(line.replace(*YOURS), comments=True)
        if program == "make":
            assert words[0] in targets, line
            continue
        if "--agent.help" in words or "--help" in words:
            continue
        if words[0] != "-m":
            module = importlib.import_module(SCRIPTS.get(words[0], Path(words[0]).stem))
            if hasattr(module, "main"):
                parse(module, words)
            continue
        if words[1] == "pytest":
            continue
        name = find_module(words[1])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name and error.name.split(".")[0] in ("torch", "lerobot_policy_otql"), line
            source = next(ROOT.glob(f"**/{name.replace('.', '/')}.py")).read_text()
            assert all(f'"{word.split("=")[0]}"' in source for word in words if word.startswith("--")), line
            continue
        parse(module, words[1:])
        if name == "experiments.sweep.command" and sweep.FLAGS.grid not in ("yours.py", "lam.py"):
            sweep.load_grid(sweep.FLAGS.grid)


@pytest.mark.check
def test_a_command_that_is_wrong_is_found(parse):
    for words in (["main.py", "--ofline_steps=3"], ["main.py", "--agent.lamb=3"], ["main.py", "--agent=agents/x.py"]):
        with pytest.raises(BaseException, match=r"ofline_steps|lamb|agents/x\.py"):
            parse(importlib.import_module("main"), words)
    assert len([line for page in PAGES for line in commands(page)]) > 60


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.check
@each_page
def test_links_and_figures_resolve(page):
    for image, text, target in LINK.findall(prose(page)):
        assert not image or len(text) > 15, f"{target} has no alternative text"
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target
    for tag in re.findall(r"<img [^>]+>", page.read_text()):
        source, alternative = (re.search(rf'{name}="([^"]+)"', tag) for name in ("src", "alt"))
        assert source and alternative and len(alternative[1]) > 15, tag
        assert (page.parent / source[1]).exists(), tag


@pytest.mark.check
@each_page
def test_files_exist(page):
    folders = "agents|docs|envs|examples|experiments|real|tests|utils"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", prose(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.check
def test_the_readme_is_four_screens_with_its_two_commands():
    assert len(README.read_text().splitlines()) <= 150
    assert [block for block in blocks(README, "bash") if "make" in block] == ["make quickstart\n", "make test\n"]


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    (source,) = blocks(README, "python")
    for text, smaller in {
        "offline_steps=10_000": "offline_steps=20, log_interval=10",
        "episodes=10": "episodes=1",
    }.items():
        assert source.count(text) == 1
        source = source.replace(text, smaller)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), names)
    assert names["chunks"].shape == (8, names["result"].agent.config.action_dim)
    assert read_csv(names["result"].directory / "train.csv")["step"].tolist() == [10, 20]


@pytest.mark.check
def test_python_elsewhere_compiles_and_imports():
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert len(found) >= 6
    for block in found:
        compile(block, "docs", "exec")
        for line in re.findall(r"(?m)^(?:from|import) .+$", block):
            exec(line, {})


def test_the_agent_of_the_docs_trains(pointmaze, tmp_path):
    (source,) = blocks(ROOT / "docs" / "agents.md", "python")
    agent = tmp_path / "mine.py"
    agent.write_text(source)
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path / 'exp'}", "--offline_steps=4")
    run_main(f"--agent={agent}", *TINY, *flags, "--log_interval=2", "--vary=agent.margin=0,0.1", "--eval_episodes=0")
    table = read_csv(next((tmp_path / "exp").rglob("train.csv")))
    assert 0 <= table["kept"][-1] <= 1


@pytest.mark.check
def test_the_grid_of_the_docs_is_one(tmp_path):
    (source,) = blocks(ROOT / "docs" / "sweeps.md", "python")
    (tmp_path / "lam.py").write_text(source)
    name, grid = sweep.load_grid(str(tmp_path / "lam.py"))
    assert name == "lam" and grid.seeds == 3 and len(grid.settings) == 2


@pytest.mark.check
def test_every_agent_is_in_the_tables():
    for page in (README, ROOT / "docs" / "train.md"):
        assert [name for name in AGENTS if f"agents/{name}.py" not in page.read_text()] == [], page


@pytest.mark.check
def test_flags_of_other_code_are_in_the_faq():
    text = (ROOT / "docs" / "faq.md").read_text()
    assert [flag for flag in REPLACED if f"| `--{flag}` |" not in text] == []
