"""What several seeds say of a method: its mean, its gain, and how sure the gain is."""

import math
import statistics
from collections.abc import Mapping, Sequence


def summary(scores: Mapping[int, float]) -> dict:
    """Score by seed, mean, and standard deviation (of two seeds or more)."""
    values = list(scores.values())
    return {
        'scores': {str(seed): score for seed, score in scores.items()},
        'mean': statistics.mean(values) if values else None,
        'deviation': statistics.stdev(values) if len(values) > 1 else None,
    }


def compare(alone: Mapping[int, float], distilled: Mapping[int, float], teacher: float | None) -> dict:
    r"""The gain of a method over its student alone, over the :math:`n` seeds that both have.

    With :math:`d_i` the difference of the two scores of seed :math:`i` and :math:`s` standard deviations,

    .. math::
        \text{gain} = \frac{1}{n} \sum_i d_i, \qquad
        \text{SE}_\text{unpaired} = \sqrt{\frac{s_\text{alone}^2}{n} + \frac{s_\text{distilled}^2}{n}}, \qquad
        \text{SE}_\text{paired} = \frac{s_d}{\sqrt{n}}

    Args:
        alone: Seed to score of the student alone.
        distilled: Seed to score of the same student with the method.
        teacher: The teacher's score.

    Returns:
        ``gain``, ``gap_closed`` (gain over the teacher's lead), and for both kinds of standard error ``error``,
        ``ratio`` (gain over it) and ``significant`` (the gain is more than two of them). What cannot be known
        is ``None``: everything without a common seed, errors of one seed, the ratio to an error of zero.
    """
    seeds = [seed for seed in distilled if seed in alone]
    if not seeds:
        return {'gain': None, 'gap_closed': None, 'unpaired': _error(None, None), 'paired': _error(None, None)}
    count = len(seeds)
    base, own = [alone[seed] for seed in seeds], [distilled[seed] for seed in seeds]
    differences = [b - a for a, b in zip(base, own, strict=True)]
    gain = statistics.mean(differences)
    lead = None if teacher is None else teacher - statistics.mean(base)
    unpaired = paired = None
    if count > 1:
        unpaired = math.sqrt(statistics.variance(base) / count + statistics.variance(own) / count)
        paired = statistics.stdev(differences) / math.sqrt(count)
    return {
        'gain': gain,
        'gap_closed': gain / lead if lead is not None and lead > 0 else None,
        'unpaired': _error(gain, unpaired),
        'paired': _error(gain, paired),
    }


def _error(gain: float | None, error: float | None) -> dict:
    if gain is None or error is None:
        return {'error': error, 'ratio': None, 'significant': None}
    return {'error': error, 'ratio': gain / error if error else None, 'significant': gain > 2 * error}


def ratio_of_medians(own: Sequence[float], base: Sequence[float]) -> float | None:
    """Median of one over median of the other; ``None`` without values."""
    return statistics.median(own) / statistics.median(base) if own and base else None
