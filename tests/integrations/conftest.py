import pytest


@pytest.fixture
def no_fallback(caplog):
    """No call of the test may take the stock path."""
    yield
    assert not [record for record in caplog.records if "stock path" in record.message]
