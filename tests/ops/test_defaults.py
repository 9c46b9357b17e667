"""An op's default on CUDA is what a committed GPU result speaks for."""

import json
from pathlib import Path

import pytest

from llava_fast.ops import backend

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def unproven(proven: dict[tuple[str, str], str], results: list[dict]) -> list[str]:
    """Ops whose default on CUDA has no result in which it is right and faster at every size in bfloat16.

    A row of a result belongs to an op if it bears its name: so do its backward pass and its fused forms, which one
    choice of backend serves.
    """
    found = []
    for (op, device), chosen in proven.items():
        tables = [
            [row for row in result.get("ops") or () if op in row["op"] and row["backend"] == chosen]
            for result in results
        ]
        tables = [[row for row in rows if row["dtype"] == "bfloat16"] for rows in tables]
        proofs = (rows and all(row["right"] and row.get("faster") for row in rows) for rows in tables)
        if device == "cuda" and not any(proofs):
            found.append(op)
    return found


def test_every_default_on_cuda_has_its_result():
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    assert results
    assert backend._proven
    assert not unproven(backend._proven, results)


@pytest.mark.parametrize(
    ("change", "is_proof"),
    [
        ({}, True),
        ({"faster": False}, False),
        ({"faster": None}, False),
        ({"right": False}, False),
        ({"backend": "reference"}, False),
        ({"dtype": "float16"}, False),
        ({"op": "mix_rows"}, False),
    ],
    ids=str,
)
def test_what_counts_as_a_proof(change, is_proof):
    row = {"op": "token_pack", "backend": "triton", "dtype": "bfloat16", "right": True, "faster": True} | change
    proven = {("token_pack", "cuda"): "triton", ("rope", "cpu"): "native"}
    assert unproven(proven, [{"versions": {}}, {"ops": [row]}]) == ([] if is_proof else ["token_pack"])
    slow = {"op": "token_pack_backward", "backend": "triton", "dtype": "bfloat16", "right": True, "faster": False}
    assert unproven(proven, [{"ops": [row, slow]}]) == ["token_pack"]
    assert unproven(proven, []) == ["token_pack"]
