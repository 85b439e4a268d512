"""The table of attacks in docs/explanation/threat-model.md and the tests marked ``attack`` are the same list."""

import ast
import re
from collections import Counter
from pathlib import Path

ROW = re.compile(r"^\| (A\d\d) \|.*\| `(tests/[\w/]+\.py)::(\w+)` \|$", re.MULTILINE)


def marked(path: Path):
    """(id, test) of every function with the mark in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in (found for found in ast.walk(tree) if isinstance(found, ast.FunctionDef)):
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.attack":
                yield ast.literal_eval(mark.args[0]), node.name


def test_every_attack_has_a_test_and_every_such_test_is_in_the_table(request):
    root = request.config.rootpath
    page = (root / "docs/explanation/threat-model.md").read_text(encoding="utf-8")
    told = Counter(ROW.findall(page))
    assert len(re.findall(r"^\| A\d\d ", page, re.MULTILINE)) == sum(told.values()), "a row names no test"
    shown = Counter(
        (name, path.relative_to(root).as_posix(), test)
        for path in (root / "tests").rglob("test_*.py")
        if "mark.attack" in path.read_text(encoding="utf-8")
        for name, test in marked(path)
    )
    assert told == shown
    assert len({name for name, _, _ in told}) == sum(told.values()) > 50, "an id stands for two attacks"
