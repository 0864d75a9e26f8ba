"""StyleGAN2 and BigBiGAN as the papers describe them: plain, unshared, nothing computed ahead.

Modules and state dicts have the published names. The tests write pickles from them, `decode.py` measures against them.
"""

import math
from typing import Any, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- StyleGAN2: one convolution kernel per sample ------------------------------------------------------------


def _kernel() -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64


def _smooth(x: Tensor, kernel: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    "Padding and the low-pass filter, channel by channel, with the gain of a twofold upsampling."
    x = F.pad(x, pad)
    return F.conv2d(x, (4 * kernel).expand(x.shape[1], 1, 4, 4), groups=x.shape[1])


def _enlarged(x: Tensor, kernel: Tensor) -> Tensor:
    "Zeros between the pixels, then the filter."
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height, 2, width, 2)
    spread[:, :, :, 0, :, 0] = x
    return _smooth(spread.reshape(batch, channels, 2 * height, 2 * width), kernel, (2, 1, 2, 1))


def modulated_conv2d(x: Tensor, weight: Tensor, style: Tensor, up: bool = False, demodulate: bool = True) -> Tensor:
    "Each sample has a kernel of its own; one grouped convolution for the batch."
    batch, inputs, height, width = x.shape
    outputs, _, size, _ = weight.shape
    kernels = weight * style[:, None, :, None, None]
    if demodulate:
        kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, batch * inputs, height, width)
    if up:
        kernels = kernels.transpose(1, 2).reshape(batch * inputs, outputs, size, size)
        x = F.conv_transpose2d(x, kernels, stride=2, groups=batch)
    else:
        x = F.conv2d(x, kernels.reshape(batch * outputs, inputs, size, size), padding=size // 2, groups=batch)
    return x.reshape(batch, outputs, *x.shape[2:])


class FullyConnectedLayer(nn.Module):
    "Linear layer with scaled weights, perhaps a leaky ReLU."

    def __init__(self, inputs: int, outputs: int, activation: str = "linear", lr_multiplier: float = 1.0):
        super().__init__()
        self.activation, self.weight_gain, self.bias_gain = activation, lr_multiplier / math.sqrt(inputs), lr_multiplier
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        "`(B, inputs)` to `(B, outputs)`."
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activation == "lrelu" else x


class MappingNetwork(nn.Module):
    "z and label to w, once for every slot."

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int = 8,
                 embed_features: int | None = None, layer_features: int | None = None, lr_multiplier: float = 0.01):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.num_layers = z_dim, c_dim, w_dim, num_ws, num_layers
        embedded = (embed_features or w_dim) if c_dim else 0
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, embedded)
        widths = [z_dim + embedded] + [layer_features or w_dim] * (num_layers - 1) + [w_dim]
        for i in range(num_layers):
            setattr(self, f"fc{i}", FullyConnectedLayer(widths[i], widths[i + 1], "lrelu", lr_multiplier))
        self.register_buffer("w_avg", torch.empty(w_dim))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        "`(B, num_ws, w_dim)`."
        parts = [z] if c is None else [z, self.embed(c)]
        x = torch.cat([part * (part.square().mean(1, keepdim=True) + 1e-8).rsqrt() for part in parts], 1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x[:, None].repeat(1, self.num_ws, 1)


class SynthesisLayer(nn.Module):
    "Modulated 3x3 convolution, noise, bias, activation, clamp."

    def __init__(self, inputs: int, outputs: int, w_dim: int, resolution: int, up: int = 1, use_noise: bool = True,
                 conv_clamp: float | None = None):
        super().__init__()
        self.resolution, self.up, self.use_noise, self.activation, self.conv_clamp = resolution, up, use_noise, "lrelu", conv_clamp
        self.register_buffer("resample_filter", _kernel())
        self.affine = FullyConnectedLayer(w_dim, inputs)
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs, 3, 3)), nn.Parameter(torch.empty(outputs))
        if use_noise:
            self.register_buffer("noise_const", torch.empty(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.empty([]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        "Features at this layer's resolution."
        x = modulated_conv2d(x, self.weight, self.affine(w), up=self.up == 2)
        if self.up == 2:
            x = _smooth(x, self.resample_filter, (1, 1, 1, 1))
        if self.use_noise:
            x = x + self.noise_const * self.noise_strength
        x = F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class ToRGBLayer(nn.Module):
    "Modulated 1x1 convolution to colours."

    def __init__(self, inputs: int, outputs: int, w_dim: int, conv_clamp: float | None = None):
        super().__init__()
        self.conv_clamp, self.weight_gain = conv_clamp, 1 / math.sqrt(inputs)
        self.affine = FullyConnectedLayer(w_dim, inputs)
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs, 1, 1)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        "An image at the resolution of `x`."
        x = modulated_conv2d(x, self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        x = x + self.bias[:, None, None]
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class Conv2dLayer(nn.Module):
    "The way around a block of the residual architecture."

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight_gain = 1 / math.sqrt(inputs)
        self.register_buffer("resample_filter", _kernel())
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 1, 1))

    def forward(self, x: Tensor, gain: float) -> Tensor:
        "Twice the resolution."
        return _enlarged(F.conv2d(x, self.weight * self.weight_gain), self.resample_filter) * gain


class SynthesisBlock(nn.Module):
    "The layers of one resolution."

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, img_channels: int, is_last: bool,
                 architecture: str, use_noise: bool, conv_clamp: float | None):
        super().__init__()
        self.in_channels, self.resolution, self.is_last, self.architecture = in_channels, resolution, is_last, architecture
        self.register_buffer("resample_filter", _kernel())
        if in_channels == 0:
            self.const = nn.Parameter(torch.empty(out_channels, 4, 4))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, 2, use_noise, conv_clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, 1, use_noise, conv_clamp)
        if is_last or architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp)
        if in_channels and architecture == "resnet":
            self.skip = Conv2dLayer(in_channels, out_channels)

    def forward(self, x: Tensor | None, image: Tensor | None, ws: Tensor) -> tuple[Tensor, Tensor | None]:
        "Features and image; `ws (B, 2 or 3, w_dim)` holds the rows of this block."
        first, *_, last = rows = ws.unbind(1)
        if x is None:
            x = self.conv1(self.const.repeat(len(ws), 1, 1, 1), first)
        elif self.architecture == "resnet":
            around = self.skip(x, gain=math.sqrt(0.5))
            x = around + self.conv1(self.conv0(x, first), rows[1]) * math.sqrt(0.5)
        else:
            x = self.conv1(self.conv0(x, first), rows[1])
        if hasattr(self, "torgb"):
            painted = self.torgb(x, last)
            image = painted if image is None else _enlarged(image, self.resample_filter) + painted
        return x, image


class SynthesisNetwork(nn.Module):
    "w to images."

    def __init__(self, w_dim: int, img_resolution: int, img_channels: int, channel_base: int = 32768, channel_max: int = 512,
                 architecture: str = "skip", use_noise: bool = True, conv_clamp: float | None = None, num_fp16_res: int = 0):
        super().__init__()
        self.img_resolution, self.block_resolutions = img_resolution, [2**i for i in range(2, img_resolution.bit_length())]
        self.num_ws, inputs = 2 * len(self.block_resolutions), 0
        for size in self.block_resolutions:
            outputs, last = min(channel_base // size, channel_max), size == img_resolution
            block = SynthesisBlock(inputs, outputs, w_dim, size, img_channels, last, architecture, use_noise, conv_clamp)
            setattr(self, f"b{size}", block)
            inputs = outputs

    def forward(self, ws: Tensor) -> Tensor:
        "Raw images of `ws (B, num_ws, w_dim)`."
        x = image = None
        for i, size in enumerate(self.block_resolutions):
            rows = ws[:, max(0, 2 * i - 1) : 2 * i + 2]
            x, image = getattr(self, f"b{size}")(x, image, rows)
        return image


class Generator(nn.Module):
    "A StyleGAN2 with the constructor of the published one."

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, img_resolution: int, img_channels: int,
                 mapping_kwargs: Mapping[str, Any] | None = None, synthesis_kwargs: Mapping[str, Any] | None = None):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **(synthesis_kwargs or {}))
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **(mapping_kwargs or {}))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        "Raw images."
        return self.synthesis(self.mapping(z, c))


# ---- BigBiGAN: spectral norms at every forward, attention in full --------------------------------------------


class PlainBigBiGAN:
    "The network of a published state dict, step by step as it is described."

    def __init__(self, state: Mapping[str, Tensor], chunk: int = 20, class_id: int = 0):
        self.state, self.chunk, self.class_id = dict(state), chunk, class_id
        self.depth = sum(name.endswith(".0.conv1.weight") for name in state)

    def weight(self, name: str) -> Tensor:
        "A weight over its spectral norm, which is estimated anew."
        weight, u = self.state[f"{name}.weight"], self.state[f"{name}.u0"]
        matrix = weight.flatten(1)
        v = F.normalize(u @ matrix, dim=1, eps=1e-4)
        u = F.normalize(v @ matrix.T, dim=1, eps=1e-4)
        return weight / (v @ matrix.T @ u.T)

    def conv(self, name: str, x: Tensor) -> Tensor:
        "A convolution that keeps the size."
        weight = self.weight(name)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        "Conditional batch norm by stored statistics."
        x = F.batch_norm(x, self.state[f"{name}.stored_mean"], self.state[f"{name}.stored_var"], eps=1e-4)
        gain, bias = (F.linear(y, self.weight(f"{name}.{part}"))[:, :, None, None] for part in ("gain", "bias"))
        return x * (1 + gain) + bias

    def attention(self, name: str, x: Tensor) -> Tensor:
        "Self-attention with its matrix of scores in memory."
        theta, phi, g = (self.conv(f"{name}.{part}", x) for part in ("theta", "phi", "g"))
        phi, g = F.max_pool2d(phi, 2).flatten(2), F.max_pool2d(g, 2).flatten(2)
        scores = F.softmax(theta.flatten(2).transpose(1, 2) @ phi, dim=-1)
        seen = (g @ scores.transpose(1, 2)).unflatten(2, x.shape[2:])
        return self.state[f"{name}.gamma"] * self.conv(f"{name}.o", seen) + x

    def block(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        "A residual block that doubles the resolution."
        h = F.interpolate(F.relu(self.norm(f"{name}.bn1", x, y)), scale_factor=2)
        h = F.relu(self.norm(f"{name}.bn2", self.conv(f"{name}.conv1", h), y))
        return self.conv(f"{name}.conv2", h) + self.conv(f"{name}.conv_sc", F.interpolate(x, scale_factor=2))

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        "`(B, chunks * chunk)` to images in [-1, 1]."
        first, *chunks = z.split(self.chunk, dim=1)
        label = self.state["shared.weight"][self.class_id].expand(len(z), -1)
        x = F.linear(first, self.weight("linear"), self.state["linear.bias"]).unflatten(1, (-1, 4, 4))
        for i, code in enumerate(chunks):
            x = self.block(f"blocks.{i}.0", x, torch.cat([label, code], 1))
            if f"blocks.{i}.1.gamma" in self.state:
                x = self.attention(f"blocks.{i}.1", x)
        name = "output_layer.0"
        mean, var = self.state[f"{name}.stored_mean"], self.state[f"{name}.stored_var"]
        x = F.batch_norm(x, mean, var, self.state[f"{name}.gain"], self.state[f"{name}.bias"], eps=1e-5)
        return torch.tanh(self.conv("output_layer.2", F.relu(x)))
