import gc

from orchestrator.collector import collecting_seldom


def test_the_collector_works_as_before_when_the_block_is_over() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with collecting_seldom():
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() > frozen
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_cycles_that_are_made_within_the_block_are_still_found() -> None:
    with collecting_seldom():
        gc.collect()
        for _ in range(100):
            cycle: list[object] = []
            cycle.append(cycle)
        del cycle
        assert gc.collect() >= 100
