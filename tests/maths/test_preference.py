"""The loss of Diffusion-DPO and what is said beside it; ReFL's hinge."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dojo.maths import flow, preference

WINNER = torch.tensor([0.30, 0.20, 0.25])
LOSER = torch.tensor([0.28, 0.26, 0.25])
REFERENCE = torch.tensor([0.31, 0.21, 0.24]), torch.tensor([0.27, 0.24, 0.24])


def loss(winner: Tensor, loser: Tensor, beta: float = 5000.0) -> Tensor:
    return preference.dpo(winner, loser, *REFERENCE, beta=beta).loss


def test_the_loss_is_log_two_at_the_reference_exactly() -> None:
    found = preference.dpo(*REFERENCE, *REFERENCE, beta=5000.0)
    assert torch.equal(found.loss, torch.full((3,), math.log(2)))
    assert torch.equal(found.accuracy, torch.full((3,), 0.5))
    assert torch.equal(found.margin, torch.zeros(3))


def test_the_loss_is_the_papers_formula() -> None:
    inside = -0.5 * 40.0 * ((WINNER - REFERENCE[0]) - (LOSER - REFERENCE[1]))
    assert torch.allclose(loss(WINNER, LOSER, 40.0), -torch.log(torch.sigmoid(inside)))


def test_diffusers_beta_is_half_of_this_one() -> None:
    # Its example: -logsigmoid(beta (model_diff_ref - model_diff)) with beta 2500.
    ours = loss(WINNER, LOSER, 0.02 * 5000)
    model, ref = WINNER - LOSER, REFERENCE[0] - REFERENCE[1]
    assert torch.allclose(ours, -F.logsigmoid(0.02 * 2500 * (ref - model)), atol=1e-6)


def test_summed_errors_want_beta_divided_by_the_dimension() -> None:
    size = 16_384
    summed = [size * one for one in (WINNER, LOSER, *REFERENCE)]
    assert torch.allclose(
        preference.dpo(*summed, beta=100.0 / size).loss, loss(WINNER, LOSER, 100.0), atol=1e-5
    )


def test_the_gradient_lowers_the_winners_error_and_raises_the_losers() -> None:
    winner, loser = WINNER.clone().requires_grad_(), LOSER.clone().requires_grad_()
    loss(winner, loser, 10.0).sum().backward()
    assert winner.grad is not None
    assert loser.grad is not None
    assert (winner.grad > 0).all()
    assert torch.allclose(winner.grad, -loser.grad)


def test_at_the_reference_the_gradient_is_a_quarter_of_beta() -> None:
    winner = REFERENCE[0].clone().requires_grad_()
    loss(winner, REFERENCE[1], 8.0).sum().backward()
    assert winner.grad is not None
    assert torch.allclose(winner.grad, torch.full((3,), 0.25 * 8.0))


def test_a_small_beta_leaves_log_two() -> None:
    assert torch.allclose(loss(WINNER, LOSER, 1e-6), torch.full((3,), math.log(2)), atol=1e-6)


def test_a_huge_lead_neither_overflows_nor_pulls() -> None:
    winner = torch.zeros(3).requires_grad_()
    found = preference.dpo(winner, torch.full((3,), 10.0), *REFERENCE, beta=5000.0)
    found.loss.sum().backward()
    assert torch.isfinite(found.loss).all()
    assert winner.grad is not None
    assert winner.grad.abs().max() < 1e-6


def test_accuracy_margin_and_drift_say_which_way_it_went() -> None:
    found = preference.dpo(WINNER, LOSER, *REFERENCE, beta=5000.0)
    assert found.accuracy.tolist() == [1.0, 1.0, 0.5]
    assert torch.allclose(found.winner_drift, WINNER - REFERENCE[0])
    assert torch.allclose(found.loser_drift, LOSER - REFERENCE[1])
    assert torch.allclose(found.margin, -2500 * (found.winner_drift - found.loser_drift))
    assert not any(v.requires_grad for v in (found.margin, found.accuracy, found.winner_drift))


def test_the_mean_is_over_losses_and_not_over_what_is_inside() -> None:
    # diffusers had logsigmoid(x.mean()) once.
    apart = loss(WINNER, LOSER, 200.0)
    inside = -100.0 * ((WINNER - REFERENCE[0]) - (LOSER - REFERENCE[1]))
    assert apart.mean() > -F.logsigmoid(inside.mean()) + 1e-4


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="--beta_dpo"):
        loss(WINNER, LOSER, beta)


class LinearFlow:
    """A linear network of a rectified flow, its reference, and pairs noised alike: float64."""

    def __init__(self, *, moved: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.reference = draw(6, 6)
        self.policy = (self.reference + moved * draw(6, 6)).requires_grad_()
        self.pictures = draw(2, 5, 6)  # winners, losers
        self.noise, self.sigma = draw(5, 6), torch.rand(5, generator=generator).double()

    def errors(self, network: Tensor, pictures: Tensor) -> Tensor:
        noisy = flow.interpolate(pictures, self.noise, self.sigma)
        return (noisy @ network - flow.velocity(pictures, self.noise)).square().mean(1)

    def loss(
        self, pictures: Tensor, more: tuple[Tensor | float, Tensor | float] = (0, 0)
    ) -> Tensor:
        """Mean over the pairs; `more` is added to the errors of a side under both models."""
        own, before = (
            [self.errors(network, side) + extra for side, extra in zip(pictures, more, strict=True)]
            for network in (self.policy, self.reference)
        )
        return preference.dpo(*own, *before, beta=2.0).loss.mean()

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.policy)[0]


def test_of_a_flow_at_the_reference_every_pair_pulls_with_half_its_weight() -> None:
    case = LinearFlow(moved=0.0)
    loss = case.loss(case.pictures)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    winner, loser = (case.errors(case.policy, side) for side in case.pictures)
    # sigmoid(0) of beta / 2 times the difference of the errors.
    expected = case.gradient(0.5 * (2.0 / 2) * (winner - loser).mean())
    torch.testing.assert_close(case.gradient(loss), expected)


def test_of_a_flow_at_the_reference_a_swapped_pair_pulls_the_other_way() -> None:
    case = LinearFlow(moved=0.0)
    forth, back = (
        case.gradient(case.loss(some)) for some in (case.pictures, case.pictures.flip(0))
    )
    torch.testing.assert_close(forth, -back)
    assert forth.abs().max() > 0.1


def test_of_a_flow_twice_the_same_picture_teaches_nothing() -> None:
    case = LinearFlow()
    loss = case.loss(case.pictures[:1].repeat(2, 1, 1))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert case.gradient(loss).abs().max() < 1e-15


def test_of_a_flow_what_both_models_get_wrong_of_a_picture_does_not_count() -> None:
    # Noise in a picture that no model can know adds the same to both errors.
    case = LinearFlow()
    plain, shifted = case.loss(case.pictures), case.loss(case.pictures, (0.7, case.sigma))
    torch.testing.assert_close(shifted, plain)
    torch.testing.assert_close(case.gradient(shifted), case.gradient(plain))


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9, 1.0])
def test_the_guard_leaves_the_winner_exactly_the_share_that_was_asked_for(mu: float) -> None:
    # Both predictions move by the same step: d m_w = -<g_w, g_w - scale g_l>.
    generator = torch.Generator().manual_seed(0)
    winner = torch.randn(64, 24, generator=generator, dtype=torch.float64)
    loser = 2 * winner + torch.randn(64, 24, generator=generator, dtype=torch.float64)
    scale = preference.guard(winner, loser, mu).double()
    change = -(winner * (winner - scale[:, None] * loser)).mean(1)
    assert (scale < 1).all()
    torch.testing.assert_close(change, -mu * winner.square().mean(1), atol=1e-6, rtol=1e-5)


def test_the_guard_holds_nothing_back_that_does_not_harm_the_winner() -> None:
    winner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    loser = torch.tensor([[-3.0, 1.0], [0.0, 5.0], [0.05, 9.0], [2.0, 0.0]])
    # against it, across it, along it by less than mu leaves, along it by more
    scale = preference.guard(winner, loser, 0.9)
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert scale[3].item() == pytest.approx(0.1 / 2)
    assert preference.guard(torch.zeros(1, 2), torch.zeros(1, 2), 0.9).tolist() == [1.0]


def test_a_scaled_pull_keeps_the_error_and_scales_its_gradient() -> None:
    error = LOSER.clone().requires_grad_()
    scale = torch.tensor([0.0, 0.25, 1.0])
    held = preference.scaled_pull(error, scale)
    assert torch.equal(held.detach(), LOSER)
    held.sum().backward()
    assert error.grad is not None
    assert torch.equal(error.grad, scale)


def test_the_hinge_pulls_until_the_margin_and_no_further() -> None:
    scores = torch.tensor([-1.0, 1.9, 2.0, 3.0], requires_grad=True)
    found = preference.shortfall(scores, 2.0)
    assert torch.allclose(found, torch.tensor([3.0, 0.1, 0.0, 0.0]))
    found.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_without_a_margin_every_picture_pulls() -> None:
    scores = torch.tensor([-1.0, 30.0], requires_grad=True)
    preference.shortfall(scores, None).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, -1.0]
