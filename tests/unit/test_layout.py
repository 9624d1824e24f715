"""House rules that a machine can check; each failure names the place."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCE_ROOTS = ("libs", "services", "agents")

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70


def _modules(*folders: str) -> list[pathlib.Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not re.search(r"_pb2(_grpc)?\.py$", path.name))


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_source_root_hides_the_others() -> None:
    assert [root for root in SOURCE_ROOTS if (ROOT / root / "leasehold" / "__init__.py").exists()] == []


def test_every_package_says_that_it_is_typed() -> None:
    packages = [
        folder
        for root in SOURCE_ROOTS
        for folder in (ROOT / root / "leasehold").glob("*")
        if (folder / "__init__.py").exists()
    ]

    assert packages
    assert [_name(folder) for folder in packages if not (folder / "py.typed").exists()] == []


def test_modules_stay_small() -> None:
    sizes = {_name(path): len(path.read_text("utf-8").splitlines()) for path in _modules(*SOURCE_ROOTS)}

    assert {name: lines for name, lines in sizes.items() if lines > MODULE_LINES_MAX} == {}


def test_functions_fit_a_screen() -> None:
    long: dict[str, int] = {}
    for path in _modules(*SOURCE_ROOTS):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long[f"{_name(path)}:{node.name}"] = lines

    assert long == {}


def test_nothing_is_left_to_do() -> None:
    # Split, so that this line is not found.
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")))
    found = [_name(path) for path in _modules(*SOURCE_ROOTS, "tests") if marks.search(path.read_text("utf-8"))]

    assert found == []


def test_unit_tests_do_not_sleep() -> None:
    sleeps = re.compile(r"\btime\.sleep\(|\basyncio\.sleep\((?!0\))")
    found = [_name(path) for path in _modules("tests/unit") if sleeps.search(path.read_text("utf-8"))]

    assert found in ([], ["tests/unit/test_layout.py"])


def test_no_test_is_skipped() -> None:
    marks = re.compile(r"mark\.(skip|xfail)|pytest\.(skip|xfail)\(")
    found = [_name(path) for path in _modules("tests") if marks.search(path.read_text("utf-8"))]

    assert [name for name in found if name != "tests/unit/test_layout.py"] == []


@pytest.mark.parametrize("call", ["time.time(", "datetime.now(", "random.", "uuid4(", "asyncio."])
def test_the_core_has_no_clock_and_no_chance(call: str) -> None:
    found = [
        _name(path)
        for path in _modules("libs/leasehold/core")
        if re.search(rf"(?<![\w.]){re.escape(call)}", path.read_text("utf-8"))
    ]

    assert found == []


def test_the_readme_names_only_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text("utf-8") + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))

    assert set(re.findall(r"(?:^|`|\| )make ([a-z-]+)", readme, re.MULTILINE)) <= targets
