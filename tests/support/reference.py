"""Slow, literal forms of every formula and of a whole training, from the papers, importing nothing of ours."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def log_prob(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Per example, the log-probability of each answer token, one at a time."""
    rows = []
    for b in range(labels.shape[0]):
        row = []
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            if target != -100:
                weights = torch.exp(logits[b, t].double())
                row.append(torch.log(weights[target] / weights.sum()))
        rows.append(row)
    return rows


def sequence_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([torch.stack(row).sum() for row in log_prob(logits, labels)])


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1.0 / (1.0 + torch.exp(-x)))


def npo(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """2/beta log(1 + (p_theta/p_ref)^beta), the form of the paper's equation (3)."""
    return 2.0 / beta * torch.log(1.0 + torch.exp(logp - ref) ** beta)


def simnpo(logp: Tensor, lengths: Tensor, beta: float, delta: float) -> Tensor:
    return -2.0 / beta * log_sigmoid(-beta / lengths * logp - beta * delta)


def dpo(chosen: Tensor, chosen_ref: Tensor, rejected: Tensor, rejected_ref: Tensor, beta: float) -> Tensor:
    return -2.0 / beta * log_sigmoid(beta * (chosen - chosen_ref) - beta * (rejected - rejected_ref))


def target_loss(logp: Tensor, lengths: Tensor, levels: list[float], two_sided: bool = False) -> Tensor:
    """Half the square of what the loss per token lacks of the level, and of what it has too much if two-sided."""
    values = []
    for b, level in enumerate(levels):
        lacks = level - (-logp[b] / int(lengths[b]))
        counts = two_sided or lacks > 0
        values.append(lacks**2 / 2 if counts else 0.0 * lacks)
    return torch.stack(values)


def kl(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    totals = []
    for b in range(labels.shape[0]):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(labels.shape[1] - 1):
            if int(labels[b, t + 1]) != -100:
                p = torch.softmax(ref_logits[b, t].double(), -1)
                q = torch.softmax(logits[b, t].double(), -1)
                for v in range(len(p)):
                    total = total + p[v] * (math.log(p[v]) - torch.log(q[v]))
        totals.append(total)
    return torch.stack(totals)


def logit_difference(target: list[float], assistant: list[float], weight: float, ratio: float) -> list[float]:
    """ULD's distribution of one token, word by word: probabilities. `ratio` 0: no filter."""
    total = sum(math.exp(x) for x in target)
    probabilities = [math.exp(x) / total for x in target]
    count = max(1, int(ratio * len(target)))
    last = sorted(probabilities, reverse=True)[count - 1]
    passes = [ratio == 0 or p >= ratio * max(probabilities) or p >= last for p in probabilities]
    shares = [math.exp(t + weight * a) * ok for t, a, ok in zip(target, assistant, passes, strict=True)]
    together = sum(p for p, ok in zip(probabilities, passes, strict=True) if ok)
    return [
        together * share / sum(shares) if ok else p for p, share, ok in zip(probabilities, shares, passes, strict=True)
    ]


# ---- functions of the probabilities of answer tokens ----


def weighted_ascent(logits: Tensor, labels: Tensor, weight: Callable[[float], float]) -> Tensor:
    """Per example the sum over its answer tokens of `weight(p) log p`, where the weight is a number."""
    return torch.stack([sum(weight(math.exp(logp.item())) * logp for logp in row) for row in log_prob(logits, labels)])


def jensen_shannon(p: Tensor, q: list[float]) -> Tensor:
    """Both halves over the vocabulary, with `0 log 0 = 0`."""
    total = torch.zeros((), dtype=torch.float64)
    for p_v, q_v in zip(p, q, strict=True):
        mean = (p_v + q_v) / 2
        if p_v > 0:
            total = total + p_v * torch.log(p_v / mean) / 2
        if q_v > 0:
            total = total + q_v * torch.log(q_v / mean) / 2
    return total


def jensun(logits: Tensor, labels: Tensor) -> Tensor:
    """Per example the sum over a refusal's tokens of the divergence from the distribution that is this token."""
    totals = []
    for b in range(labels.shape[0]):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(labels.shape[1] - 1):
            if int(labels[b, t + 1]) != -100:
                token = [1.0 if v == int(labels[b, t + 1]) else 0.0 for v in range(logits.shape[-1])]
                total = total + jensen_shannon(torch.softmax(logits[b, t].double(), -1), token)
        totals.append(total)
    return torch.stack(totals)


def flat(logits: Tensor, labels: Tensor, refusal_logits: Tensor, refusal_labels: Tensor) -> Tensor:
    """The loss that maximizes the total variation: g* and f*(g*) are tanh(x) / 2, and x is a mean probability."""

    def tanh(x: Tensor) -> Tensor:
        return (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x))

    values = []
    for forget, refusal in zip(log_prob(logits, labels), log_prob(refusal_logits, refusal_labels), strict=True):
        bad, good = (sum(torch.exp(logp) for logp in row) / len(row) for row in (forget, refusal))
        values.append(-tanh(good) / 2 + tanh(bad) / 2)
    return torch.stack(values)


# ---- rules, in the space of the gradients themselves rather than of their Gramian ----


def blur_direction(g_f: Tensor, g_r: Tensor, lower: str, gamma: float, alpha: float, clamp: bool) -> Tensor:
    g_l, g_u = (g_f, g_r) if lower == "forget" else (g_r, g_f)
    rho = torch.dot(g_u, g_l) / torch.dot(g_l, g_l) if torch.dot(g_l, g_l) > 0 else torch.zeros(())
    weight = gamma - alpha * rho
    if clamp:
        weight = max(torch.zeros_like(weight), weight)
    return alpha * g_u + weight * g_l


def pcgrad_direction(g_f: Tensor, g_r: Tensor) -> Tensor:
    f, r = g_f.clone(), g_r.clone()
    if torch.dot(g_f, g_r) < 0:
        f = g_f - torch.dot(g_f, g_r) / torch.dot(g_r, g_r) * g_r
        r = g_r - torch.dot(g_r, g_f) / torch.dot(g_f, g_f) * g_f
    return f + r


def mgda_direction(g_f: Tensor, g_r: Tensor) -> Tensor:
    """Ternary search for the shortest vector between both gradients: the length is convex in the share of `g_f`."""
    low, high = 0.0, 1.0
    for _ in range(200):
        third = (high - low) / 3
        left, right = low + third, high - third
        if (left * g_f + (1 - left) * g_r).norm() < (right * g_f + (1 - right) * g_r).norm():
            high = right
        else:
            low = left
    return low * g_f + (1 - low) * g_r


def ngdiff_direction(g_f: Tensor, g_r: Tensor) -> Tensor:
    """The paper's `g_retain / norm - g_NLL on forget / norm`, with `g_f` the gradient of ascent."""
    return g_r / g_r.norm() - (-g_f) / (-g_f).norm()


class GruDirection:
    """The mean of retain gradients is kept as a vector."""

    def __init__(self, smoothing: float, retain_weight: float):
        self.smoothing, self.retain_weight = smoothing, retain_weight
        self.mean: Tensor | float = 0.0

    def __call__(self, g_f: Tensor, g_r: Tensor) -> Tensor:
        self.mean = self.smoothing * g_r + (1 - self.smoothing) * self.mean
        rectified = g_f
        if torch.dot(g_f, self.mean) < 0:
            rectified = g_f - torch.dot(g_f, self.mean) / torch.dot(self.mean, self.mean) * self.mean
        return rectified + self.retain_weight * g_r


class ConstrainedDirection:
    """The multiplier is moved after each step, by the retain loss that the step saw."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], epsilon: float, initial: float, rate: float):
        self.inner, self.epsilon, self.multiplier, self.rate = inner, epsilon, initial, rate

    def __call__(self, g_f: Tensor, g_r: Tensor) -> Tensor:
        return self.inner(g_f, self.multiplier * g_r)

    def observe(self, retain_loss: float) -> None:
        self.multiplier = max(0.0, self.multiplier + self.rate * (retain_loss - self.epsilon))


# ---- the whole training, without Trainer, accumulation or collators ----


def mixed_value(before: float, after: float, a: float) -> float:
    """2406.09179: a theta_before + (1 - a) theta_after, of one number."""
    return a * before + (1.0 - a) * after


# Student's 97.5 % points by degrees of freedom, from a printed table (NIST handbook, 1.3.6.7.2)
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262}


def student_interval(numbers: list[float]) -> tuple[float, float]:
    """mean -+ t s / sqrt(n), s^2 = sum (x - mean)^2 / (n - 1)."""
    n, total, squares = len(numbers), 0.0, 0.0
    for number in numbers:
        total += number
    for number in numbers:
        squares += (number - total / n) ** 2
    half = STUDENT[n - 1] * math.sqrt(squares / (n - 1)) / math.sqrt(n)
    return total / n - half, total / n + half


def unbeaten(points: list[tuple[float, float]]) -> set[tuple[float, float]]:
    """Each point against each other one."""
    front = set()
    for x, y in points:
        beaten = False
        for u, v in points:
            beaten = beaten or (u >= x and v >= y and (u > x or v > y))
        if not beaten:
            front.add((x, y))
    return front


def union_area(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area of the union of the rectangles from the reference to each point, by inclusion and exclusion."""
    area = 0.0
    for subset in range(1, 2 ** len(points)):
        inside = [point for i, point in enumerate(points) if subset >> i & 1]
        width = min(x for x, _ in inside) - reference[0]
        height = min(y for _, y in inside) - reference[1]
        area += (-1) ** (len(inside) + 1) * max(width, 0.0) * max(height, 0.0)
    return area


def full_gradient(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """d loss / d parameter for every trainable parameter; zeros where it does not enter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def moved_along(model: nn.Module, gradient: Tensor, rho: float) -> nn.Module:
    """A copy of the model whose trainable weights are moved by `rho` in the gradient's direction."""
    moved = copy.deepcopy(model)
    direction, offset = rho * gradient / gradient.norm(), 0
    for parameter in (p for p in moved.parameters() if p.requires_grad):
        step = direction[offset : offset + parameter.numel()].view_as(parameter)
        parameter.data = (parameter.data.double() + step).to(parameter.dtype)
        offset += parameter.numel()
    return moved


def train(
    model: nn.Module,
    windows: list[dict[str, list[dict]]],
    losses: dict[str, Callable[[nn.Module, list[dict]], Tensor]],
    direction: Callable[[Tensor, Tensor], Tensor],
    *,
    learning_rates: list[float],
    max_grad_norm: float = 1.0,
    bf16: bool = False,
    sam_rho: float | None = None,
    mask: Tensor | None = None,
) -> nn.Module:
    """One AdamW step per window: both gradients flattened into one vector each, combined, clipped, applied.

    `bf16`: gradients are those of the model in bf16, the optimizer moves fp32 masters (as DeepSpeed does). `sam_rho`:
    the forget gradient is that of a copy of the model, moved so far along it. A direction with `observe` is told the
    retain loss after each step. `mask`: 1 for each entry that may change, else 0.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    for window, learning_rate in zip(windows, learning_rates, strict=True):
        shadow = copy.deepcopy(model).bfloat16() if bf16 else model
        values = {role: losses[role](shadow, window[role]) for role in ("forget", "retain")}
        flat = {
            role: torch.cat([g.flatten() for g in full_gradient(shadow, values[role])]).double()
            for role in ("forget", "retain")
        }
        if mask is not None:
            flat = {role: gradient * mask for role, gradient in flat.items()}
        if sam_rho is not None:
            moved = moved_along(model, flat["forget"], sam_rho)
            gradients = full_gradient(moved, losses["forget"](moved, window["forget"]))
            flat["forget"] = torch.cat([g.flatten() for g in gradients]).double() * (1.0 if mask is None else mask)
        step = direction(flat["forget"], flat["retain"])
        if hasattr(direction, "observe"):
            direction.observe(values["retain"].item())
        norm = step.norm()
        if max_grad_norm and norm > max_grad_norm:
            step = step * (max_grad_norm / (norm + 1e-6))
        offset = 0
        for parameter in parameters:
            size = parameter.numel()
            parameter.grad = step[offset : offset + size].view_as(parameter).to(parameter.dtype)
            offset += size
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    return model


def top_share(scores: list[float], share: float) -> list[bool]:
    """True for the highest scores: so many as the share says, and all that equal the last of them; never for a 0."""
    last = sorted(scores, reverse=True)[max(1, round(share * len(scores))) - 1]
    return [score >= last and score > 0 for score in scores]


def saliency_scores(model: nn.Module, rows: list[dict], loss: Callable[[nn.Module, list[dict]], Tensor]) -> list[float]:
    """SalUn: the size of each entry of the forget gradient over all rows."""
    return [abs(value) for g in full_gradient(model, loss(model, rows)) for value in g.flatten().tolist()]


def fisher_scores(model: nn.Module, batches: list[dict[str, list[dict]]], tiny: float = 1e-30) -> list[float]:
    """Mean over batches of each entry's squared NLL gradient, of forget over that of retain."""
    means = {}
    for role in ("forget", "retain"):
        gradients = [full_gradient(model, token_mean_nll(model, batch[role])) for batch in batches]
        rows = [[value for g in gradient for value in g.flatten().tolist()] for gradient in gradients]
        means[role] = [sum(value**2 for value in column) / len(rows) for column in zip(*rows, strict=True)]
    return [f / (r + tiny) for f, r in zip(means["forget"], means["retain"], strict=True)]


def row_log_prob(model: nn.Module, row: dict) -> tuple[Tensor, int]:
    """One unpadded example: `log p(answer | prompt)` and the number of answer tokens."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    values = log_prob(model(input_ids=ids).logits, labels)[0]
    return torch.stack(values).sum(), len(values)


def token_mean_nll(model: nn.Module, rows: list[dict]) -> Tensor:
    """Over the tokens of all rows; those of a row with a weight count so much."""
    pairs = [(row.get("weight", 1.0), *row_log_prob(model, row)) for row in rows]
    return -sum(weight * logp for weight, logp, _ in pairs) / sum(weight * count for weight, _, count in pairs)


def example_mean_npo(ref_model: nn.Module, beta: float) -> Callable[[nn.Module, list[dict]], Tensor]:
    def loss(model: nn.Module, rows: list[dict]) -> Tensor:
        values = []
        for row in rows:
            with torch.no_grad():
                ref, _ = row_log_prob(ref_model, row)
            values.append(npo(row_log_prob(model, row)[0], ref, beta))
        return torch.stack(values).mean()

    return loss


def example_mean_target_loss(two_sided: bool = False) -> Callable[[nn.Module, list[dict]], Tensor]:
    """Of rows with a `forget_level` each."""

    def loss(model: nn.Module, rows: list[dict]) -> Tensor:
        pairs = [row_log_prob(model, row) for row in rows]
        logp, lengths = torch.stack([p for p, _ in pairs]), torch.tensor([n for _, n in pairs])
        return target_loss(logp, lengths, [row["forget_level"] for row in rows], two_sided).mean()

    return loss


def ascent_until(model: nn.Module, rows: list[dict]) -> Tensor:
    """Token mean of ascent; rows whose loss per token has reached their `forget_level` are left out of the sum only."""
    total, tokens = 0.0, 0
    for row in rows:
        logp, count = row_log_prob(model, row)
        tokens += count
        if -logp.item() / count < row["forget_level"]:
            total = total + logp
    return total / tokens


# ---- activations: the whole model runs, and one layer's output is looked up ----


def layer_output(model: nn.Module, row: dict, layer: int) -> Tensor:
    """`(T, H)` of one unpadded example; of the last layer it would be behind the final norm."""
    return model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer + 1][0]


def token_mean_distance(layer: int, goal: Callable[[dict], Tensor]) -> Callable[[nn.Module, list[dict]], Tensor]:
    """Mean over all tokens of all examples of `||h - goal||^2 / H`, token by token; `goal(row)` is `(T, H)`."""

    def loss(model: nn.Module, rows: list[dict]) -> Tensor:
        values = []
        for row in rows:
            wanted = goal(row)
            for t, hidden in enumerate(layer_output(model, row, layer)):
                difference = hidden - wanted[t]
                values.append(torch.dot(difference, difference) / len(difference))
        return sum(values) / len(values)

    return loss


def towards(vector: Tensor, coefficient: float) -> Callable[[dict], Tensor]:
    return lambda row: torch.stack([coefficient * vector] * len(row["input_ids"]))


def as_frozen(model: nn.Module, layer: int) -> Callable[[dict], Tensor]:
    frozen = copy.deepcopy(model)
    return lambda row: layer_output(frozen, row, layer).detach()


# ---- values of whole distributions: one answer token's logits at a time, in float64 ----


def undial(z: Tensor, ref: Tensor, label: int, beta: float = 10.0) -> Tensor:
    """Cross entropy of the model under the reference's distribution, whose label has `beta` less."""
    lowered = ref.clone()
    lowered[label] = ref[label] - beta
    return cross_entropy(torch.softmax(lowered, -1), torch.softmax(z, -1))


def ce_u(z: Tensor, ref: Tensor, label: int) -> Tensor:
    """Cross entropy of the model under what it says itself beside the label."""
    others = torch.softmax(z.detach(), -1)
    others[label] = 0.0
    return cross_entropy(others / others.sum(), torch.softmax(z, -1))


def cross_entropy(q: Tensor, p: Tensor) -> Tensor:
    return -sum(q[v].item() * torch.log(p[v]) for v in range(len(p)) if q[v] > 0)


def uniform(z: Tensor, ref: Tensor, label: int) -> Tensor:
    p = torch.softmax(z, -1)
    return sum(math.log(1 / len(p)) - torch.log(p[v]) for v in range(len(p))) / len(p)


def clamped_entropy(z: Tensor, ref: Tensor, label: int, tau: float = 0.7) -> Tensor:
    p = torch.softmax(z, -1)
    missing = tau * math.log(len(p)) + sum(p[v] * torch.log(p[v]) for v in range(len(p)))
    return missing if missing > 0 else 0.0 * missing


def margin(z: Tensor, ref: Tensor, label: int) -> Tensor:
    return (max(z.unbind()) - sum(z.unbind()) / len(z)) ** 2


def jsd(z: Tensor, ref: Tensor, label: int) -> Tensor:
    p, q = torch.softmax(z, -1), torch.softmax(ref, -1)
    total = torch.zeros((), dtype=torch.float64)
    for v in range(len(p)):
        middle = (p[v] + q[v]) / 2
        total = total + (p[v] * torch.log(p[v] / middle) + q[v] * torch.log(q[v] / middle)) / 2
    return total


def at_answer_tokens(
    value: Callable[[Tensor, Tensor, int], Tensor], logits: Tensor, ref_logits: Tensor, labels: Tensor, skip: int = 0
) -> list[list[Tensor]]:
    """Per example, `value` of each answer token but the first `skip`: position `t` says token `t + 1`."""
    rows = []
    for b in range(labels.shape[0]):
        places = [t for t in range(labels.shape[1] - 1) if int(labels[b, t + 1]) != -100][skip:]
        pairs = [(logits[b, t].double(), ref_logits[b, t].double()) for t in places]
        rows.append([value(z, ref, int(labels[b, t + 1])) for (z, ref), t in zip(pairs, places, strict=True)])
    return rows


def likeliest_end(model: nn.Module, row: dict) -> tuple[int, int]:
    """How many of the last target tokens are the likeliest in a row, from the last one back; and how many there are."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
    count = 0
    for t in reversed(places):
        if int(logits[t - 1].argmax()) != row["labels"][t]:
            break
        count += 1
    return count, len(places)


def greedy(model: nn.Module, prompt: list[int], ends: set[int], most: int) -> list[int]:
    """Token after token, each from a whole forward pass."""
    written: list[int] = []
    while len(written) < most:
        token = int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written


def distinct_share(tokens: list[int], n: int = 4, window: int = 64) -> float:
    """Of the n-grams that end in the last tokens: how many there are without repeats, over how many there are."""
    last = tokens[max(0, len(tokens) - window) :]
    seen, total = [], 0
    for end in range(n, len(last) + 1):
        total += 1
        if last[end - n : end] not in seen:
            seen.append(last[end - n : end])
    return len(seen) / total if total else 1.0


def pair_auc(members: list[float], others: list[float]) -> float:
    """How often a member's score is lower than another's, ties one half."""
    wins = [1.0 if m < o else 0.5 if m == o else 0.0 for m in members for o in others]
    return sum(wins) / len(wins)
