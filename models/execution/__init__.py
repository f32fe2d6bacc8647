"""Fast execution of a network: the same function as its `forward`, with other operations.

`Training` and `Inference` walk over the `layers` of a model. They replace the blocks of this package by faster
operations and call every other layer, so any model works. Parameters and buffers remain those of the model.

On a CPU passes over memory cost more time than arithmetic. So oneDNN fuses bias, activation and sum into the
convolution before them ("post-operations"), BatchNorm takes one pass for the statistics and one for the rest, and
convolutions with few channels treat four neighbouring pixels as channels. For some gradients in bf16 oneDNN has only a
reference implementation; these are composed of fast convolutions. benchmarks/README.md has the gains. The choice
depends only on the kind of layer, so the same model gives the same bits.
"""
