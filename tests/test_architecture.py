"""The layers of the code: which file may import which, and which packages they need."""

import ast
import glob
import os
import sys

from processes import ROOT, run

MODEL = ["fp8", "parallel", "model", "vision"]  # each imports torch, the standard library, and what is left of it here
PROGRAMS = ["generate", "train"]  # `train` uses the engine of `generate`; nothing else imports a program
PACKAGES = {"torch", "safetensors", "sentencepiece", "PIL", "numpy"}


def trees() -> dict[str, ast.Module]:
    """Of every shipped file, by the name under which it is imported."""
    paths = glob.glob(os.path.join(ROOT, "*.py")) + glob.glob(
        os.path.join(ROOT, "runtime", "**", "*.py"), recursive=True
    )
    return {os.path.relpath(path, ROOT)[:-3].replace(os.sep, "."): ast.parse(read(path), path) for path in paths}


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def imported(nodes) -> set[str]:
    """What is imported in or under these nodes, in functions too: `runtime.files`, of anything else the first name."""
    names = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                names |= {alias.name for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                below = [f"runtime.{alias.name}" for alias in inner.names]
                names |= set(below) if inner.module == "runtime" else {inner.module}
    return {name if name.startswith("runtime.") else name.split(".")[0] for name in names}


def is_tail(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports() -> dict[str, set[str]]:
    """Of every shipped file what it imports of ours, but for the tail that makes a program of it."""
    found = {name: imported(node for node in tree.body if not is_tail(node)) for name, tree in trees().items()}
    return {name: {other for other in names if other in found} for name, names in found.items()}


def test_the_top_level():
    names = set(trees())
    assert {name for name in names if not name.startswith("runtime.")} == {*MODEL, *PROGRAMS}
    assert all(name.count(".") == 1 for name in names if name.startswith("runtime.")), "runtime/ is flat"


def test_imports_point_downward():
    found = imports()
    for i, name in enumerate(MODEL):
        assert found[name] <= set(MODEL[:i]), f"{name}.py imports {sorted(found[name] - set(MODEL[:i]))}"
    for name in found:
        allowed = {"generate"} if name == "train" else set()
        assert not (found[name] & set(PROGRAMS)) - allowed, f"{name} imports a program"


def test_no_circles():
    """What imports nothing that is left can be taken away, again and again, until nothing is left."""
    left = imports()
    while left:
        lowest = [name for name, others in left.items() if not others & set(left)]
        assert lowest, f"these import each other in a circle: {sorted(left)}"
        for name in lowest:
            del left[name]


def test_packages():
    """What is shipped needs five packages; the scripts in examples/ and benchmarks/ are not part of that."""
    for name, tree in trees().items():
        others = {other for other in imported([tree]) if not other.startswith("runtime.")}
        strangers = others - set(MODEL) - set(PROGRAMS) - PACKAGES - set(sys.stdlib_module_names)
        assert not strangers, f"{name} imports {sorted(strangers)}"
        assert name not in MODEL or not others & (PACKAGES - {"torch"}), f"{name} imports {sorted(others)}"
    required = [line.split("=")[0] for line in read(os.path.join(ROOT, "requirements.txt")).split()]
    assert set(required) - {"pytest"} == {"torch", "safetensors", "sentencepiece", "pillow", "numpy"}


def test_the_tests():
    """No file of tests imports another: what they share is in modules of its own."""
    for path in glob.glob(os.path.join(ROOT, "tests", "**", "test_*.py"), recursive=True):
        assert not [name for name in imported([ast.parse(read(path))]) if name.startswith("test_")], path


def test_nothing_slow_is_imported():
    """torch.compile's modules take two seconds and 85 MB; answering and training do without, also once they run."""
    code = """
import sys, generate, train
from runtime import export, plan
generate.main(["--max-new-tokens", "2", "--temperature", "0", "Hello"])
slow = {"torch._dynamo", "torch._inductor", "sympy", "transformers"}
print(sorted(slow & set(sys.modules)))
"""
    ended = run("-c", code)
    assert ended.status == 0 and ended.out.splitlines()[-1] == "[]", ended.out + ended.err
