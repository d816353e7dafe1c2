"""``python -m sdgen_lib COMMAND``: what each command says of itself, and the forms of one module each."""

import importlib
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sdgen_lib.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
OLD_FORMS = {name: name for name in ("report", "export", "bench", "launch")} | {"pretrain_tiny": "pretrain"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def check_help(text: str, name: str) -> None:
    """The usage names the command, and a line says what it does, before the arguments are listed."""
    usage, says, *arguments = re.split(r"\n\s*\n", text)
    assert re.match(rf"usage: (?s:.*)\b{name}\b", usage)
    assert len(says.split()) >= 3 and not says.startswith(("positional", "options"))
    assert any("--help" in part for part in arguments)


def test_help_lists_every_command_and_imports_none():
    done = python("-X", "importtime", "-m", "sdgen_lib", "--help")
    assert done.returncode == 0
    for name, (_, does) in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(does)}$", done.stdout, re.MULTILINE)
    assert not re.search(r"\| +(torch|numpy|sdgen_lib\.(show|share|tools))$", done.stderr, re.MULTILINE)


def test_without_a_command_it_says_what_is_missing():
    done = python("-m", "sdgen_lib")
    assert done.returncode == 2 and "usage: python -m sdgen_lib" in done.stderr and "COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "right"), [("exprt", "export"), ("reports", "report"), ("pretrain_tiny", "pretrain")]
)
def test_an_unknown_command_names_the_right_one(wrong, right, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([wrong, "--help"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"Unknown command {wrong!r}. Did you mean {right!r}? Allowed: bench, export" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    check_help(capsys.readouterr().out, name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_its_arguments_as_a_list(name):
    module = importlib.import_module(f"sdgen_lib.{COMMANDS[name][0]}")
    (argv,) = inspect.signature(module.main).parameters.values()
    assert argv.name == "argv" and argv.default is None


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_and_the_exit_status_are_passed_on(name, monkeypatch):
    module = importlib.import_module(f"sdgen_lib.{COMMANDS[name][0]}")
    seen = []
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv) or 7)
    monkeypatch.setattr(sys, "argv", ["sdgen_lib", name, "one", "--two", "-h"])
    assert main() == 7 and seen == [["one", "--two", "-h"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_argument_stops_a_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--no-such-option"])
    assert stopped.value.code == 2 and "usage: " in capsys.readouterr().err


@pytest.mark.parametrize(("old", "name"), OLD_FORMS.items())
def test_the_form_of_one_module_a_command_works(old, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [old, "--help"])
    monkeypatch.delitem(sys.modules, f"sdgen_lib.{old}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"sdgen_lib.{old}", run_name="__main__")
    assert not stopped.value.code
    check_help(capsys.readouterr().out, name)


def test_a_reader_who_has_seen_enough_is_no_error():
    """``python -m sdgen_lib report | head -1``"""
    command = [sys.executable, "-m", "sdgen_lib", "bench", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_both_forms_in_a_process_of_their_own():
    new, old = python("-m", "sdgen_lib", "report", "--help"), python("-m", "sdgen_lib.report", "--help")
    assert (new.returncode, old.returncode) == (0, 0)
    assert new.stdout == old.stdout != ""
