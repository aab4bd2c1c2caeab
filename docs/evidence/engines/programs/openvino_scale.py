"""A stateful OpenVINO model whose scale is 0 computes with the default scale; without a state it is right.

With a scale of 0 all weights are equal, so that an output is the mean of the values."""

import numpy as np
import openvino as ov
from openvino import opset6, opset13

FLOAT32 = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


def attention(query, key, value, mask):
    return opset13.scaled_dot_product_attention(query, key, value, mask, opset13.constant(np.float32(0)))


def parameter(*shape):
    return opset13.parameter(list(shape), np.float32)


def cached(new, name, beams):
    empty = opset13.concat([opset13.shape_of(beams), opset13.constant(np.array([2, 0, 8]))], 0)
    start = opset13.broadcast(opset13.constant(np.float32(0)), empty)
    past = opset13.gather(opset6.read_value(start, name, np.float32, [-1, 2, -1, 8]), beams, opset13.constant(0))
    grown = opset13.concat([past, new], 2)
    return grown, opset6.assign(grown, name)


query, key, value = (parameter(-1, 2, -1, 8) for _ in range(3))
mask, beams = parameter(-1, -1, -1, -1), opset13.parameter([-1], np.int32)
plain = ov.Model([attention(query, key, value, mask)], [query, key, value, mask])
(keys, first), (values, second) = cached(key, "key", beams), cached(value, "value", beams)
output = opset13.result(attention(query, keys, values, mask))
stateful = ov.Model([output], [first, second], [query, key, value, mask, beams])

rng = np.random.default_rng(0)
inputs = [rng.normal(size=(1, 2, 3, 8)).astype(np.float32) for _ in range(3)]
for name, model, more in (("without a state", plain, []), ("stateful", stateful, [np.zeros(1, np.int32)])):
    request = ov.Core().compile_model(model, "CPU", FLOAT32).create_infer_request()
    given = request.infer([*inputs, np.zeros((1, 1, 3, 3), np.float32), *more])[0]
    print(f"{name}: off by {np.abs(given - inputs[2].mean(axis=2, keepdims=True)).max():.2g}")
