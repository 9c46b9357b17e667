"""docs/families.md against the registry: every family has a row, and every row its tests."""

import json

import pytest

from llava_fast.families import FAMILIES
from tests.checkpoints.test_guests import GUESTS, HOSTED
from tests.support.families_page import BOUND, DOCS, OWN_TESTS, SERVED, TRAINED, cases, families, named_tests, page
from tests.train.test_guests_train import LLAVAS as LLAVA_CASES

FIGURES = json.loads((DOCS / "families.json").read_text())
LLAVAS = ("llava", "llava_next", "llava_next_video", "llava_onevision")  # tested by every suite
TRAINED_CASES = (*LLAVA_CASES, *GUESTS, *HOSTED)


def test_the_page_is_what_the_registry_says():
    assert (DOCS / "families.md").read_text(encoding="utf-8") == page(FIGURES), (
        "python -m tests.support.families_page writes it"
    )
    assert {name for family in families() for name in family.model_types} == set(FAMILIES)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_types[0])
def test_every_row_has_its_tests(family):
    name = family.model_types[0]
    for test in (*named_tests(family), TRAINED, SERVED):
        assert (DOCS.parent / test).exists(), test
    if name in OWN_TESTS:
        assert name.removeprefix("llava_") in (DOCS.parent / OWN_TESTS[name][0]).read_text() or name == "llava_llama"
    else:
        assert cases(family), "no case in tests/support/tiny.py"
        assert name in LLAVAS or set(cases(family)) <= set(GUESTS)
        assert set(cases(family)) & set(TRAINED_CASES)
    if name != "llava_llama":  # compared by its tensors
        assert 0 < FIGURES[name]["logits"] <= BOUND
        assert 0 < FIGURES[name]["gradients"] <= BOUND
