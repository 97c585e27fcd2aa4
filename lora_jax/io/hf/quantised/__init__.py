"""Quantised Hugging Face directories: the tensors of a weight, in codes and scales, as one `Quantised` parameter.

```
read.py          packed_tensors: which method a directory was quantised with
packed.py        Packed: a weight whose tensors are codes and what belongs to them
bitsandbytes.py  nf4, fp4 and int8
scaled.py        float8 and int8 in whole tensors: fp8 in tiles, and compressed-tensors
whole_numbers.py whole numbers in groups of inputs with a scale and a zero point each
gptq.py, awq.py, compressed.py  three ways to pack them
mxfp4.py         the experts of gpt-oss
```
"""
