"Schedules: closed forms, bounds, the oracle of transformers, and rates as the Learner sets them."
import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from vl_tutor.training.learner import Schedule, StepLog, Table, dict_loaders, make_learner
from vl_tutor.training.schedules import cosine_above, cosine_to_floor, simla_schedule, simla_table, warmup_then_linear

quick = settings(max_examples=60, deadline=None, derandomize=True)
STEPS = dict(warm=st.integers(0, 50), total=st.integers(51, 400))


@quick
@given(**STEPS)
def test_triangle_agrees_with_transformers(warm, total):
    from transformers import get_linear_schedule_with_warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    theirs = get_linear_schedule_with_warmup(optimizer, warm, total).lr_lambdas[0]
    for step in range(0, total + 3, 7): assert warmup_then_linear(step, warm, total) == pytest.approx(theirs(step), abs=1e-12)


@quick
@given(**STEPS, floor=st.floats(0, 1))
def test_cosines_stay_between_floor_and_one(warm, total, floor):
    for make in (cosine_to_floor, cosine_above):
        row = [make(floor)(s, warm, total) for s in range(total + 5)]
        assert row[warm] == 1. and row[total] == pytest.approx(floor, abs=1e-12)
        assert all(a >= b - 1e-12 for a, b in zip(row[warm:], row[warm + 1:])) and min(row[warm:]) >= floor - 1e-12
        assert row[:warm] == [s/warm for s in range(warm)]
    with pytest.raises(ValueError, match='share of the rate'): make(1.5)


def test_imagenet_table():
    "The rates that spec and fixtures of VLC list, epochs as steps"
    at = lambda epoch: 2e-3*cosine_to_floor(1e-6/2e-3)(epoch, 5, 100)
    for epoch, rate in [(0, 0.), (.5, 2e-4), (2.5, 1e-3), (5, 2e-3), (10, .001986368122751021), (50, .0010830380557995962), (99.5, 1.1366266600272304e-06), (100, 1e-6)]:
        assert at(epoch) == pytest.approx(rate, abs=1e-15)


def test_uni_perceiver_factor():
    f = cosine_above(1e-6/1e-3)
    assert [round(f(s, 10, 50), 4) for s in (0, 1, 10, 11, 30, 39)] == [0., .1, 1., .9985, .5, .1753]
    assert f(50, 10, 50) == f(51, 10, 50) == 1e-3


@quick
@given(lr=st.floats(1e-5, 1e-3), stairs=st.integers(1, 30), epochs=st.integers(1, 40), epoch_steps=st.integers(1, 3000))
def test_simla_schedule_reads_its_table(lr, stairs, epochs, epoch_steps):
    rise, fall = simla_table(lr, low=1e-5, floor=1e-6, epochs=epochs, stairs=stairs)
    assert len(rise) == stairs + 1 and len(fall) == epochs
    assert rise[0] == 1e-5 and rise[-1] == pytest.approx(lr) and fall[0] == pytest.approx(lr)
    f = simla_schedule(lr, low=1e-5, floor=1e-6, epochs=epochs, stairs=stairs, epoch_steps=epoch_steps)
    for step in range(0, epoch_steps*epochs, max(1, epoch_steps*epochs//50)):
        epoch, i = step//epoch_steps, step % epoch_steps
        assert lr*f(step) == pytest.approx(rise[min(i//100, stairs)] if epoch == 0 else fall[epoch])
    assert lr*f(epoch_steps*epochs + 5) == pytest.approx(fall[-1] if epochs > 1 else fall[0])
    with pytest.raises(ValueError, match='a stair and an epoch'): simla_table(1., stairs=0)


@pytest.mark.parametrize('factor', [warmup_then_linear, cosine_to_floor(.01), cosine_above(.01), simla_schedule(.1, low=.01, epochs=3, stairs=2, epoch_steps=5, every=2)])
def test_the_learner_takes_them(factor):
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    loaders = dict_loaders(Table(x=x, y=x.sum(1, keepdim=True)), Table(x=x, y=x.sum(1, keepdim=True)), bs=8)
    log = StepLog()
    learn = make_learner(nn.Linear(4, 1), loaders, lambda model, batch: dict(mse=F.mse_loss(model(batch['x']), batch['y'])), lr=.1, schedule=Schedule(factor, ratio=.2), cbs=[log])
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    rates = [row['lr'] for row in log.rows if 'lr' in row]
    assert len(rates) == 15 and rates == pytest.approx([.1*factor(s, 3, 15) for s in range(15)])
    assert all(math.isfinite(r) for r in rates)
