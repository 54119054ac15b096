"""The list of what tests/soak/protections.py switches off fits the code and the tests that are there now."""

import importlib.util

from support import ROOT


def test_every_edit_and_every_test_of_the_list_is_there() -> None:
    path = ROOT / "tests" / "soak" / "protections.py"
    spec = importlib.util.spec_from_file_location("protections", path)
    assert spec is not None and spec.loader is not None
    protections = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protections)
    listed = protections.read_list()
    assert len({entry.name for entry in listed}) == len(listed) > 80
    for entry in listed:
        protections.edited((ROOT / entry.file).read_text(encoding="utf-8"), entry)
        for test in entry.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test
