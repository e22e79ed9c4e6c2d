"""Laws of the usage ledger."""

from __future__ import annotations

import stat

import pytest

from fastchat.cluster.contract import FinalRecord
from fastchat.cluster.usage import UsageLedger, UsageTotal
from fastchat.errors import ConfigError, UnavailableError


def record(number: int, *, tenant: str = "t", model: str = "m", reason: str = "stop") -> FinalRecord:
    return FinalRecord(
        number=number,
        request_id=f"r{number}",
        tenant=tenant,
        model=model,
        num_prompt_tokens=10,
        num_cached_tokens=4,
        num_generated_tokens=2,
        reason=reason,
    )


def test_a_record_counts_once_however_often_it_is_sent():
    """The pair of worker id and number is the record's identity."""
    ledger = UsageLedger()
    assert ledger.add("w1", [record(1), record(2)]) == 2
    assert ledger.add("w1", [record(1), record(2), record(3)]) == 3
    assert ledger.add("w2", [record(1)]) == 1
    assert ledger.totals() == (UsageTotal("m", "t", 4, 40, 16, 8, 0, 0),)
    assert ledger.num_added == 4
    ledger.close()


def test_totals_are_per_model_and_tenant_and_count_bad_ends():
    """Aborted and failed requests are part of the total and counted apart."""
    ledger = UsageLedger()
    ledger.add("w", [record(1), record(2, reason="abort"), record(3, tenant="u"), record(4, reason="error", model="n")])
    found = {
        (total.model, total.tenant): (total.num_requests, total.num_aborted, total.num_failed)
        for total in ledger.totals()
    }
    assert found == {("m", "t"): (2, 1, 0), ("m", "u"): (1, 0, 0), ("n", "t"): (1, 0, 1)}
    ledger.close()


def test_an_acknowledged_record_survives_a_restart(tmp_path):
    """A second ledger on the same file knows the totals and what it has seen; the file is its owner's alone."""
    path = tmp_path / "state" / "usage.sqlite3"
    ledger = UsageLedger(path)
    ledger.add("w1", [record(1), record(2)])
    second = UsageLedger(path)  # as after a kill: the first was never closed
    assert second.add("w1", [record(2), record(3)]) == 3
    assert second.totals()[0].num_requests == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ledger.close()
    second.close()


def test_what_cannot_be_written_counts_not_at_all(tmp_path):
    """A batch is kept whole or not; the caller may try it again."""
    ledger = UsageLedger(tmp_path / "usage.sqlite3")
    ledger.add("w", [record(1)])
    ledger._database.execute("PRAGMA query_only=ON")
    with pytest.raises(UnavailableError):
        ledger.add("w", [record(2), record(3)])
    ledger._database.execute("PRAGMA query_only=OFF")
    with pytest.raises(OverflowError):
        ledger.add("w", [record(2), record(3).model_copy(update={"num_generated_tokens": 2**70})])
    assert ledger.totals()[0].num_requests == ledger.num_added == 1
    assert ledger.add("w", [record(2), record(3)]) == 3
    ledger.close()


def test_a_file_that_is_no_ledger_is_one_line(tmp_path):
    """A broken file is the operator's to move."""
    path = tmp_path / "usage.sqlite3"
    path.write_text("this is not a database, and it is longer than its header would be" * 20)
    with pytest.raises(ConfigError, match=r"usage\.sqlite3"):
        UsageLedger(path)
