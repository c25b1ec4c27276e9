@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rounds_beat_one_mask(pattern: Pattern) -> None:
    alone = wanda(pattern) != 0
    single = masked_least_squares(WEIGHT, GRAM, alone, WEIGHT, 12)
    made, _ = registry.lookup("pruners", "fast", "fit")(WEIGHT, pattern, STATS)
    assert loss(made) < loss(single)
