"""`pytest benchmarks`: every contender on every case in every mode, each result asserted, then timed.

Here each contender has its own time; `python -m benchmarks.report` interleaves them, and so compares better.
"""

from functools import lru_cache

import pytest

from .cases import CASES, MODES
from .contenders import AS_IT_COMES, CONTENDERS, PEERS, UnavailableError
from .problem import Problem
from .worker import tune_malloc

tune_malloc()
pytest.importorskip("pytest_benchmark")

problem_of = lru_cache(maxsize=1)(Problem)
PROBLEMS = [(case, mode) for mode in MODES for case in CASES if mode.suits(case)]


@pytest.mark.benchmark(min_rounds=3, max_time=0.1, warmup=False)
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != AS_IT_COMES])
@pytest.mark.parametrize(("case", "mode"), PROBLEMS, ids=[f"{mode}-{case}" for case, mode in PROBLEMS])
def test_speed(benchmark, case, mode, name):
    benchmark.group = f"{mode.title}: {case.model}"
    try:
        contender = CONTENDERS[name](problem_of(case, mode))
        result = contender.call()
    except (ImportError, UnavailableError) as error:
        pytest.skip(str(error))
    except Exception as error:
        if name not in PEERS:
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    contender.check(result)
    del result
    benchmark(contender.call)
