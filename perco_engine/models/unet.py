"""The U-Net of PerCo: Stable Diffusion's U-Net that also sees the local features of the hyper-latent."""

import inspect
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as StableDiffusionUNet
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class UnusedConv2d(nn.Conv2d):
    """A convolution that is kept for its weights and passes its input on unchanged."""

    def forward(self, sample: Tensor) -> Tensor:
        """(b, c, h, w) -> the same tensor."""
        return sample


class UNet2DConditionModel(StableDiffusionUNet):
    """diffusers' UNet2DConditionModel whose first layer takes cat[noisy latents, upsampled local features].

    The first layer is `conv_in_extended` (in_channels + local_features_channels inputs).  The base's `conv_in` stays in
    the state dict, unused, as in the published checkpoints.  A model without text has no cross-attention blocks
    (DownBlock2D, UpBlock2D, mid_block_type UNetMidBlock2D or None) and takes no encoder_hidden_states.

    Configuration, besides the base's:
        local_features_channels: channels of the local features (320, which published folders leave out).
        add_local_features: the first out_channels channels of the upsampled local features, an estimate of the clean
            latents, are added to the output; with a zero `conv_out` the network then predicts the estimate itself.

    Raises ValueError for a configuration in which the base would change the sample before its first layer, or in which
    there are fewer local features than are to be added.

    Source: Careil et al., ICLR 2024 (arXiv 2310.10325); the class and the layer have their names from PerCo (SD).
    """

    def __init__(self, *, local_features_channels: int = 320, add_local_features: bool = False, **base: Any) -> None:
        super().__init__(**base)
        if self.config.center_input_sample or self.config.addition_embed_type == "image_hint":
            raise ValueError("local features go with neither center_input_sample nor addition_embed_type image_hint")
        if self.config.conv_in_kernel % 2 == 0:
            raise ValueError(f"conv_in_kernel must be odd, not {self.config.conv_in_kernel}")
        if add_local_features and local_features_channels < self.config.out_channels:
            raise ValueError(
                f"add_local_features needs at least {self.config.out_channels} local features channels, "
                f"not {local_features_channels}"
            )
        width, kernel = self.config.block_out_channels[0], self.config.conv_in_kernel
        self.conv_in = UnusedConv2d(self.config.in_channels, width, kernel, padding=kernel // 2)
        self.conv_in_extended = nn.Conv2d(
            self.config.in_channels + local_features_channels, width, kernel, padding=kernel // 2
        )

    # diffusers reads the configuration's names and defaults off the signature: the base's, and the two above.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(StableDiffusionUNet.__init__).parameters.values(),
            *(p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY),
        ]
    )
    __init__ = register_to_config(__init__)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        *,
        local_features: Tensor,
        return_dict: bool = True,
        **base: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """One denoising prediction.

        sample: (b, in_channels, h, w) noisy latents, any h and w from 1 on.
        timestep: a number, or (b,), in 0..num_train_timesteps - 1.
        encoder_hidden_states: (b, tokens, cross_attention_dim) text embeddings; None without cross-attention.
        local_features: (b, local_features_channels, r, c), upsampled to h x w with nearest neighbour.

        Returns `.sample`: (b, out_channels, h, w), of the kind that the scheduler's prediction_type names.
        """
        if local_features.shape[-2:] != sample.shape[-2:]:
            local_features = F.interpolate(local_features, size=sample.shape[-2:], mode="nearest")
        # The base applies its conv_in next, which here passes on what it gets.
        hidden = self.conv_in_extended(torch.cat([sample, local_features], dim=1))
        (output,) = super().forward(hidden, timestep, encoder_hidden_states, return_dict=False, **base)
        if self.config.add_local_features:
            output = output + local_features[:, : self.config.out_channels]
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)
