"""The order of the modules, which may import which, how long files are, and which packages they need."""

import ast
import glob
import os
import sys

from processes import ROOT, run

# Bottom up: a module imports only from those before it.
MODULES = "config fp8 parallel vision model checkpoint tokenizer chat launch pipeline engine optimizer export"
MODULES = [*MODULES.split(), "meter", "plan", "session", "generate", "train"]
PACKAGES = {"torch", "safetensors", "sentencepiece", "PIL", "numpy"}
NARROW = {  # modules that know less than their place in the order allows
    "launch": {"config", "parallel"},
    "checkpoint": {"parallel", "fp8", "config"},
}


def trees() -> dict[str, ast.Module]:
    paths = glob.glob(os.path.join(ROOT, "*.py"))
    return {os.path.basename(path)[:-3]: ast.parse(read(path), path) for path in paths}


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def imported(nodes) -> set[str]:
    """The first names of everything that is imported in or under these nodes."""
    names = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                names |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                names.add(inner.module.split(".")[0])
    return names


def is_tail(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def test_the_modules():
    assert sorted(trees()) == sorted(MODULES) and len(MODULES) <= 18
    lengths = {name: read(os.path.join(ROOT, f"{name}.py")).count("\n") for name in MODULES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_imports_point_downward():
    """Inside functions, too, so that there is no circle; only two programs end by starting a module above them."""
    tails = {}
    for name, tree in trees().items():
        below = set(MODULES[: MODULES.index(name)])
        ours = imported(node for node in tree.body if not is_tail(node)) & set(MODULES)
        assert ours <= NARROW.get(name, below), f"{name}.py imports {sorted(ours - NARROW.get(name, below))}"
        if upward := (imported(filter(is_tail, tree.body)) & set(MODULES)) - below:
            tails[name] = upward
    assert tails == {"fp8": {"export", "launch"}, "parallel": {"plan", "launch"}}


def test_packages():
    """What is shipped needs five packages, and the scripts in examples/ and benchmarks/ are not part of that."""
    for name, tree in trees().items():
        strangers = imported([tree]) - set(MODULES) - PACKAGES - set(sys.stdlib_module_names)
        assert not strangers, f"{name}.py imports {sorted(strangers)}"
    required = [line.split("=")[0] for line in read(os.path.join(ROOT, "requirements.txt")).split()]
    assert set(required) - {"pytest"} == {"torch", "safetensors", "sentencepiece", "pillow", "numpy"}


def test_the_tests():
    """No file of tests is too long to read, and none imports another: what they share is in modules of its own."""
    for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py")):
        text = read(path)
        assert text.count("\n") <= 450, path
        assert not [name for name in imported([ast.parse(text)]) if name.startswith("test_")], path


def test_nothing_slow_is_imported():
    """torch.compile's modules take two seconds and 85 MB; answering and training do without, also once they run."""
    code = """
import sys, generate, train, export, plan
generate.main(["--max-new-tokens", "2", "--temperature", "0", "Hello"])
slow = {"torch._dynamo", "torch._inductor", "sympy", "transformers"}
print(sorted(slow & set(sys.modules)))
"""
    ended = run("-c", code)
    assert ended.status == 0 and ended.out.splitlines()[-1] == "[]", ended.out + ended.err
