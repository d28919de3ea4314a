"""Holds the code to the plan in README.md: imports go one way."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("dist_amp", "launch")
    for path in (ROOT / folder).rglob("*.py")
)
PRIVATE = re.compile(r"(keras\.src|tensorflow\.python)")


def name_of(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def planned_order():
    """Module names in the order of README.md's tree."""
    tree = re.search(
        r"## Architecture.*?```\n(.*?)```",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )[1]
    order, folder = [], ""
    for line in tree.splitlines():
        heading = re.match(r"(\w+)/", line)
        if heading:
            folder = heading[1]
        for file in re.findall(r"^ +((?:[\w/]+\.py ?)+)", line):
            order += [
                f"{folder}.{name[:-3].replace('/', '.')}"
                for name in file.split()
            ]
    return order


def imported(path):
    """Modules of this project that a file imports, at any depth in it."""
    names = {name_of(source) for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in names:
                yield node.module
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in full if name in names)


def test_every_file_has_its_place_in_the_plan():
    modules = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert modules == set(planned_order())


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name != "__init__.py"],
    ids=name_of,
)
def test_a_file_imports_only_from_above(path):
    order = planned_order()
    place = order.index(name_of(path))
    assert [n for n in imported(path) if order.index(n) >= place] == []


def test_the_library_knows_no_flags_and_prints_nothing():
    for path in (ROOT / "dist_amp").rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = {getattr(call.func, "id", "") for call in calls}
        assert "print" not in names, path
        assert "absl" not in path.read_text(), path


def test_settings_are_checked_without_tensorflow():
    plain = ("config", "flags", "run_dir", "quiet", "train")
    plain += ("numerics", "options", "plan", "verify")
    plain += ("run_record", "report_page", "report")
    plain += ("saved", "evaluate", "export", "data_service", "service_process")
    jobs = ("job", "yaml_text", "slurm", "kubernetes", "cloud_tpu")
    for name in (*plain, *jobs, "findings", "host", "doctor"):
        tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        for node in tree.body:  # what is imported when the program starts
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not re.search("tensorflow|keras|dist_amp|numpy", text)


def test_private_modules_are_not_imported():
    for path in SOURCES:
        # Two files say why they need them.
        if path.name not in ("coordination.py", "ahead_of_time.py"):
            assert not PRIVATE.search(path.read_text()), path


def test_no_function_is_longer_than_fifty_lines():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                length = node.end_lineno - body[0].lineno + 1
                assert length <= 50, f"{path}: {node.name} has {length} lines"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
