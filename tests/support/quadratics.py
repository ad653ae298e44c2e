"""Two quadratics whose bi-level answer is known in closed form, and gradient descent under a rule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blur_trainer.gradients.rules import Rule

DIM = 8


@dataclass(frozen=True)
class Problem:
    A: Tensor  # (k, n)
    b: Tensor  # (k,)
    Q: Tensor  # (n, n), SPD
    c: Tensor  # (n,)

    def forget_gradient(self, x: Tensor) -> Tensor:
        return self.A.T @ (self.A @ x - self.b)

    def retain_gradient(self, x: Tensor) -> Tensor:
        return self.Q @ (x - self.c)

    def residual(self, x: Tensor) -> float:
        return (self.A @ x - self.b).norm().item()

    def bilevel_answer(self) -> Tensor:
        """`min r` subject to `A x = b`: `[[Q, A'], [A, 0]] [x, lambda] = [Q c, b]`."""
        k = len(self.b)
        top = torch.cat([self.Q, self.A.T], 1)
        bottom = torch.cat([self.A, self.A.new_zeros(k, k)], 1)
        return torch.linalg.solve(torch.cat([top, bottom]), torch.cat([self.Q @ self.c, self.b]))[:DIM]

    def sum_answer(self, forget_weight: float) -> Tensor:
        """`min forget_weight f + r`."""
        hessian = self.Q + forget_weight * self.A.T @ self.A
        return torch.linalg.solve(hessian, self.Q @ self.c + forget_weight * self.A.T @ self.b)

    def distance(self, x: Tensor) -> float:
        return (x - self.bilevel_answer()).norm().item()


def problem(constraints: int, *, condition: float = 1.0, general: bool = False, seed: int = 0) -> Problem:
    """`A A'` has eigenvalues from 1 down to `1/condition`; `Q` is the identity, or general with eigenvalues .3 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(constraints, constraints))[0], torch.linalg.qr(normal(DIM, DIM))[0]
    exponents = torch.linspace(0.0, 0.5, constraints, dtype=torch.float64)
    A = left @ torch.diag(condition**-exponents) @ right[:, :constraints].T
    basis = torch.linalg.qr(normal(DIM, DIM))[0]
    scale = torch.linspace(0.3, 1.0, DIM, dtype=torch.float64) if general else torch.ones(DIM, dtype=torch.float64)
    return Problem(A, normal(constraints), basis @ torch.diag(scale) @ basis.T, normal(DIM))


@dataclass(frozen=True)
class LevelProblem:
    """Forgetting to a level: `nll(x) = log(1 + exp(-a x))` is to reach `level`, retain as in [`Problem`].

    `TargetLoss`, `1/2 relu(level - nll)^2`, or with `until=True` ascent that ends at the level, `relu(level - nll)`.
    What has reached the level is the half-space `a x <= edge`.
    """

    a: Tensor  # (n,)
    level: float
    Q: Tensor  # (n, n), SPD
    c: Tensor  # (n,)
    until: bool = False

    def nll(self, x: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-self.a @ x))

    @property
    def edge(self) -> float:
        return -math.log(math.expm1(self.level))

    def forget_gradient(self, x: Tensor) -> Tensor:
        missing = (self.level - self.nll(x)).clamp(min=0.0)
        return (missing.sign() if self.until else missing) * self.a / (1.0 + torch.exp(self.a @ x))

    def retain_gradient(self, x: Tensor) -> Tensor:
        return self.Q @ (x - self.c)

    def at_the_edge(self) -> Tensor:
        """`min r` on the plane `a x = edge`."""
        towards = torch.linalg.solve(self.Q, self.a)
        return self.c - towards * (self.a @ self.c - self.edge) / (self.a @ towards)

    def answer(self) -> Tensor:
        """`min r` where the level is reached."""
        return self.c if self.nll(self.c) >= self.level else self.at_the_edge()

    def distance(self, x: Tensor) -> float:
        return (x - self.answer()).norm().item()


def level_problem(wish: float, *, until: bool = False, seed: int = 0) -> LevelProblem:
    """`a c = wish`: at retain's minimizer the answer is likelier than the level allows (`wish > edge`), or is not."""
    p = problem(1, general=True, seed=seed)
    a = 2.0 * p.A[0]
    return LevelProblem(a, 2.0, p.Q, p.c + a * (wish - a @ p.c) / (a @ a), until)


def zeros() -> Tensor:
    return torch.zeros(DIM, dtype=torch.float64)


def descend(
    rule: Rule,
    p: Problem | LevelProblem,
    steps: int,
    lr: float,
    *,
    start: Tensor | None = None,
    decay: Callable[[int], float] = lambda step: 1.0,
) -> Tensor:
    """Gradient descent with step size `lr * decay(t)`."""
    x = zeros() if start is None else start
    for step in range(steps):
        gradients = torch.stack([p.forget_gradient(x), p.retain_gradient(x)])
        weights = rule(gradients @ gradients.T)
        x = x - lr * decay(step) * (weights @ gradients)
    return x


def harmonic(half: float) -> Callable[[int], float]:
    return lambda step: 1.0 / (1.0 + step / half)


def linear(steps: int) -> Callable[[int], float]:
    """Trainer's default schedule: down to 0 at the end."""
    return lambda step: 1.0 - step / steps
