"""Built-in networks. Any other `nn.Module` is named in the job as `module:callable`."""

from metadist.models.bag import Bag
from metadist.models.conv4 import Conv4
from metadist.models.encoder import Encoder
from metadist.models.losses import LOSSES, Loss, accuracy, confidence
from metadist.models.mlp import MLP
from metadist.models.model import Model
from metadist.models.policy import GaussianPolicy
from metadist.models.resnet12 import ResNet12
from metadist.models.siren import SIREN

MODELS = {
    "mlp": MLP, "conv4": Conv4, "resnet12": ResNet12, "bag": Bag, "encoder": Encoder,
    "gaussian_policy": GaussianPolicy, "siren": SIREN,
}  # fmt: skip

__all__ = [
    "LOSSES", "MODELS", "MLP", "SIREN", "Bag", "Conv4", "Encoder", "GaussianPolicy", "Loss", "Model", "ResNet12",
    "accuracy", "confidence",
]  # fmt: skip
