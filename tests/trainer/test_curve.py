from __future__ import annotations

from trainer.curve import MOST_POINTS, Curve


def test_a_curve_has_each_step_until_there_are_many() -> None:
    curve = Curve()
    curve.extend([4.0, 2.0])
    assert curve.steps() == ((1, 4.0), (2, 2.0))
    curve.extend(float(step) for step in range(3, 2 * MOST_POINTS + 2))
    again = Curve(**curve.state())
    for each in (curve, again):
        each.extend([7.0])
        steps = each.steps()
        assert len(steps) <= MOST_POINTS
        assert steps[0] == (4, (4 + 2 + 3 + 4) / 4)
        assert steps[-1][0] == 2 * MOST_POINTS + 2
    assert again.steps() == curve.steps()
