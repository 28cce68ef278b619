"""The terms of both theorems, and for each term the sweeps in which it is the largest.

Theorem 1 (JAGUAR SignSGD, x in R^d):

    E ||grad f(x^N)||_1 = O( delta_0 / (gamma T) + d ||grad f(x^0)||_2 / (T sqrt(1 - beta)) + d^2 L gamma / (1 - beta)
                             + sqrt(1 - beta) d sigma + d L tau + d Delta / tau ),    delta_0 = f(x^0) - f*

Theorem 2 (JAGUAR Muon, X in R^(m x n), n <= m):

    E ||grad f(X^N)||_S1 = O( delta_0 / (gamma T) + m^(1/2) n ||grad f(X^0)||_2 / (T sqrt(1 - beta))
                              + m^(3/2) n^2 gamma / (1 - beta) + sqrt(1 - beta) m^(1/2) n sigma + m^(1/2) n L tau
                              + m^(1/2) n Delta / tau )

N is uniform over 1, ..., T: the left side is a mean over the steps. Arbitrary tuning (the corollary of each):
gamma = gamma_0 T^(-3/4) / d (or / (m n)), beta = 1 - T^(-1/2), tau = sqrt(Delta / L) give T^(-1/4).

Source: an early version of arXiv 2506.04430 with the same title, paper/ZO_LLM_FineTuning.pdf of the repository
intsystems/ZO-LLM-FineTuning at 0da8dd2, where they are Theorems 3.5 and 3.7 and Corollaries 3.6 and 3.8. The third term
of Theorem 2 is printed without L, which it needs to be a gradient; here it has one. The second term has no sweep: as
||grad f(x^0)||_2^2 <= 2 L delta_0, the first and third together are at least sqrt(2 T) times it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from theorems.quadratics import Setting


def bound(setting: Setting) -> dict[str, float]:
    """The terms, with constants 1."""
    size = float(setting.size)
    width, lag = (size, size**2) if setting.method == "SignSGD" else (size**1.5, size**3.5)
    x, memory = setting.origin(), 1 - setting.beta
    gradient = float(setting.gradient(x).norm())
    return {
        "descent": setting.value(x) / (setting.lr * setting.steps),
        "start": width * gradient / (setting.steps * memory**0.5),
        "lag": lag * setting.smoothness * setting.lr / memory,
        "noise": memory**0.5 * width * setting.sigma,
        "smoothing": width * setting.smoothness * setting.tau if setting.kink else 0.0,
        "oracle": width * setting.delta / setting.tau,
    }


@dataclass(frozen=True)
class Sweep:
    """Settings that differ in one variable, and what a calculation expects of the slope of the left side."""

    term: str  # of `bound`, or "all"
    regime: str
    variable: str
    values: Sequence[float]
    setting: Callable[[float], Setting]
    expected: float | None = None  # None: the term's slope
    why: str = ""  # where a slope is not the term's

    @property
    def method(self) -> str:
        """The optimizer: of all values the same."""
        return self.setting(self.values[0]).method

    @property
    def name(self) -> str:
        """What `--only` searches."""
        return f"{self.method}, {self.regime}: {self.variable}"

    def abscissa(self, value: float) -> float:
        """What the variable is worth: `values` of delta_0 are starts."""
        setting = self.setting(value)
        return setting.value(setting.origin()) if self.variable == "delta_0" else value

    def term_at(self, value: float) -> float:
        """The term, with constant 1."""
        terms = bound(self.setting(value))
        return sum(terms.values()) if self.term == "all" else terms[self.term]


TURNS = (
    "On average over the coordinates' turns x' = -gamma sign(m), theta m' = grad f - m with theta = d / (1 - beta) "
    "steps, along which f + gamma theta ||m||_1 falls by gamma ||m||_1: memory alone keeps no path from the minimum. "
    "What does is that a coordinate waits d steps for its turn. A relay with that delay and that memory swings by "
    "gamma sqrt(d theta) = gamma d (1 - beta)^(-1/2) where the memory is long beside the delay; where it is not, the "
    "slope is flatter. The term is only a bound."
)
RARE = (
    "Each beta has noise that it averages badly: bursts with a fifth of one in its memory, so that they are the "
    "rarer the longer it is. That the left side falls with 1 - beta is true of these noises, not of one that stays."
)
FROBENIUS = (
    "The proof takes ||X^(t+1) - X^t||_F = gamma sqrt(m n) from the signs, but a polar factor moves by gamma sqrt(n): "
    "the same proof gives m n^2 where the theorem has m^(3/2) n^2. The largest matrix makes the slope flatter still: "
    "its memory, m n / (1 - beta) steps, is longer than the run."
)
COORDINATES = (
    "sigma^2 is the variance of the whole gradient, of which a coordinate has sigma^2 / d; Lemma 3.4 gives each all of "
    "it, a factor of sqrt(d). What is left of the difference is scatter of the seeds, a tenth of a value."
)
WANDERS = (
    "The same factor on lr, sigma and the start multiplies the left side: a slope above 1 says that the gradient, in "
    "units of sigma, is smaller for larger lr / sigma. Larger steps wander farther from where the median vanishes."
)
MEDIAN = (
    "The sign follows the median of the momentum, and that of normal noise is the mean: the sign points down on "
    "average, however large the noise, and the swing is the geometric mean of the terms of lag and noise, of order "
    "gamma^(1/2) sigma^(1/2) (1 - beta)^(-1/4). The term is only a bound here; noise in bursts attains it."
)
AVERAGED = (
    "Errors that are independent from one evaluation to the next are noise of variance Delta^2 / (2 tau^2) a "
    "coordinate: momentum averages them, with the geometric mean of normal noise. An oracle that ripples attains it. "
    "The slope is flatter than 1/2 where runs, which begin at the minimum, are too short for the swing of strong "
    "noise, and the seeds scatter by a third of a value there."
)


def _sweeps(method: str) -> list[Sweep]:
    sign = method == "SignSGD"
    scale = 1.0 if sign else 2**0.5  # singular values of a 2 x 2 matrix of Hadamard's signs, per entry
    base = Setting(method, 2, 1000, 1e-3, 0.5)
    lag = replace(base, steps=1600, lr=1e-2, start=0.01)
    # A coordinate has variance 1, and begins where the median of its momentum vanishes.
    bursts = replace(base, steps=1200, noise="bursts", sigma=base.signs.numel() ** 0.5, beta=0.9, lr=6e-4)
    median = (0.36 if sign else 0.3) * scale
    normal = replace(base, steps=1000, sigma=1.0, beta=0.9, start=0.0, lr=2e-3)
    kink = replace(base, steps=600, lr=2e-3, start=0.0, beta=0.5, kink=0.75)
    # It begins a tenth beyond the outermost of the places where the oracle can hold it, and has time for the whole way.
    ripple = replace(base, steps=800, lr=4.5e-3 * scale, smoothness=2.0, oracle="ripple", size=4 if sign else 2)
    hold = 1.1 / ripple.smoothness * scale
    tuned = replace(base, start=1.0, sigma=1.0, delta=1e-4, tau=1e-2, size=4 if sign else 2)
    size = "d" if sign else "m = n"
    found = [
        Sweep("descent", "far away", "T", (550, 800, 1100, 1500, 2000), lambda v: replace(base, steps=int(v))),
        Sweep(
            "descent",
            "far away",
            "gamma",
            (4.5e-4, 6e-4, 8e-4, 1.1e-3, 1.5e-3),
            lambda v: replace(base, lr=v, steps=1200),
        ),
        Sweep(
            "lag",
            "no noise",
            "1 - beta",
            (0.2, 0.1, 0.05, 0.025, 0.0125),
            lambda v: replace(lag, beta=1 - v),
            -0.5,
            TURNS,
        ),
        Sweep(
            "lag",
            "no noise",
            size,
            (2, 4, 8, 16),
            lambda v: replace(lag, size=int(v), beta=0.8, steps=1000),
            *(() if sign else (3.0, FROBENIUS)),
        ),
        Sweep(
            "noise",
            "bursts",
            "sigma",
            (0.5, 0.7, 1.0, 1.4, 2.0),
            lambda v: replace(bursts, sigma=bursts.sigma * v, start=median * 0.1**0.5 * v),
            why=WANDERS,
        ),
        Sweep(
            "noise",
            "bursts",
            "1 - beta",
            (0.4, 0.2, 0.1, 0.05, 0.025),
            lambda v: replace(bursts, beta=1 - v, lr=(2e-3 if sign else 4e-3) * v, start=median * v**0.5),
            why=RARE,
        ),
        Sweep(
            "noise", "normal noise", "sigma", (0.4, 0.7, 1.2, 2.0, 3.2), lambda v: replace(normal, sigma=v), 0.5, MEDIAN
        ),
        Sweep(
            "noise",
            "normal noise",
            "1 - beta",
            (0.4, 0.2, 0.1, 0.05, 0.025),
            lambda v: replace(normal, beta=1 - v),
            -0.25,
            MEDIAN,
        ),
        Sweep("smoothing", "kink", "tau", (0.1, 0.15, 0.2, 0.3, 0.4), lambda v: replace(kink, tau=v)),
        Sweep(
            "smoothing",
            "kink",
            size,
            (2, 4, 8, 16) if sign else (2, 4, 8),
            lambda v: replace(kink, size=int(v), tau=0.4, lr=1e-3, steps=800),
        ),
        Sweep(
            "oracle",
            "ripple",
            "Delta",
            (0.25, 0.35, 0.5, 0.7, 1.0),
            lambda v: replace(ripple, tau=0.15, delta=v, start=hold * v / 0.15),
        ),
        Sweep(
            "oracle",
            "ripple",
            "tau",
            (0.1, 0.12, 0.14, 0.17, 0.2),
            lambda v: replace(ripple, tau=v, delta=0.5, start=hold * 0.5 / v),
        ),
        Sweep(
            "all",
            "tuned",
            "T",
            (150, 300, 600, 1200, 2400),
            lambda v: replace(tuned, steps=int(v), lr=4 * v**-0.75 / tuned.signs.numel(), beta=1 - v**-0.5),
        ),
    ]
    if sign:  # what says the same of both methods is measured on the cheaper one
        errors = replace(normal, sigma=0.0, tau=0.2)
        found += [
            Sweep("descent", "far away", "delta_0", (0.2, 0.3, 0.4, 0.55, 0.8), lambda v: replace(base, start=v)),
            Sweep(
                "lag",
                "no noise",
                "gamma",
                (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
                lambda v: replace(lag, lr=v, beta=0.8, steps=400),
            ),
            Sweep(
                "noise",
                "bursts",
                "d",
                (2, 4, 8, 16),
                lambda v: replace(bursts, size=int(v), sigma=1.0, lr=6e-4 * 2 / v, start=median * 0.1**0.5 / v**0.5),
                0.5,
                COORDINATES,
            ),
            Sweep(
                "oracle",
                "independent",
                "Delta",
                (0.08, 0.14, 0.24, 0.4, 0.64),
                lambda v: replace(errors, delta=v),
                0.5,
                AVERAGED,
            ),
        ]
    return found


SWEEPS = _sweeps("SignSGD") + _sweeps("Muon")
