import pytest
import torch

from penjing.planes import Scheme
from penjing.quantizers import power2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_weight_is_a_power_of_two_times_its_scale(bits: int) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    planes = power2.fit(weight, Scheme(bits, 0, True, "power2"))
    ratio = (planes.dequantize() / planes.scale[0]).abs()
    exponent = ratio[ratio > 0.5].log2()
    torch.testing.assert_close(exponent, exponent.round(), rtol=0, atol=1e-4)
    assert len(planes.dequantize()[0].unique()) <= 2**bits
    # The table is known by its name: nothing of it is stored.
    assert not any("table" in name for name in planes.tensors())


def test_each_weight_is_the_nearest_without_data() -> None:
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    planes = power2.fit(weight, Scheme(3, 0, True, "power2"))
    levels = planes.scale[0].unsqueeze(2) * torch.tensor([0.0, 1, -1, 2, -2, 4, -4, 8])
    wanted = (weight.unsqueeze(2) - levels).abs().amin(2)
    torch.testing.assert_close((weight - planes.dequantize()).abs(), wanted)
